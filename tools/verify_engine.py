#!/usr/bin/env python
"""Run `norton verify_engine` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("verify_engine"))
