#!/usr/bin/env python
"""Run `norton export_torch` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("export_torch"))
