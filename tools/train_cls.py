#!/usr/bin/env python
"""Run `norton train_cls` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("train_cls"))
