#!/usr/bin/env python
import sys

from norton_deploy.commands import run

sys.exit(run("demo"))
