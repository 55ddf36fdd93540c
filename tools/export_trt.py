#!/usr/bin/env python
"""Run `norton export_trt` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("export_trt"))
