#!/usr/bin/env python
"""Run `norton import_model` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("import_model"))
