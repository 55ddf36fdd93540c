"""Compare two detectors on one's own data: AP of both by category, paired speed-up, pictures; ends in a report."""

from collections.abc import Sequence
from dataclasses import dataclass

from norton_deploy.commands import command_line
from norton_deploy.config import parse_settings
from norton_deploy.deployment.compare import CompareRequest, compare


@dataclass(frozen=True, kw_only=True)
class Settings(CompareRequest):
    """Settings of tools/compare.py."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="compare", description=__doc__ or "")
    compare(settings, command=command_line("compare", argv))
    print(settings.out / "report.html")
    return 0
