#!/usr/bin/env python
"""Run `norton eval_det` from a checkout."""

import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("eval_det"))
