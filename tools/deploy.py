#!/usr/bin/env python
"""Run `norton deploy` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("deploy"))
