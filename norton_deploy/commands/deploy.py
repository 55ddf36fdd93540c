"""From a trained detector and data to a checked engine and a report: compress, fine-tune, export, compare, measure.

Every step says how long it will take and which command does it alone; a stopped run goes on with the same line.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from norton_deploy.commands import command_line
from norton_deploy.config import parse_settings
from norton_deploy.deployment.deploy import deploy
from norton_deploy.deployment.request import DeployRequest

FIRST = ("model", "data", "task", "speedup", "target", "image-size", "quick", "finetune-steps", "categories", "plan")


@dataclass(frozen=True, kw_only=True)
class Settings(DeployRequest):
    """Settings of tools/deploy.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="deploy", description=__doc__ or "")
    try:
        deploy(settings, command=command_line("deploy", argv))
    except KeyboardInterrupt:
        print(f"{settings.out}: stopped; the same line goes on where it was", file=sys.stderr)
        raise
    print(settings.out / "report.html")
    return 0
