#!/usr/bin/env python
"""Run `norton make_synthetic` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("make_synthetic"))
