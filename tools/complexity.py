#!/usr/bin/env python
import sys

from norton_deploy.commands import run

if __name__ == "__main__":
    sys.exit(run("complexity"))
