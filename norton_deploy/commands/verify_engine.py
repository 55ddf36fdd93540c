"""norton verify_engine: run an engine or a graph where it is and compare it with the detections that travel beside it.

Exports write NAME.reference.npz: images, and what the model found in them in eager mode. An engine that was built
without a GPU has not run before; exit status 1 if it differs.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.files import check_output_file
from norton_deploy.inference.loading import load_predictor
from norton_deploy.parity.verification import ReferenceFile, reference_path, verify


@dataclass(frozen=True)
class Settings(Output):
    """Settings of verify_engine."""

    model: Path
    """Engine (.engine) or graph (.onnx)."""
    references: Path | None = None
    """Its reference detections; by default NAME.reference.npz beside it."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Load, run, compare, report."""
    settings = parse_settings(Settings, argv, prog="verify_engine", description=__doc__ or "")
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    references = ReferenceFile.load(settings.references or reference_path(settings.model))
    predictor = load_predictor(settings.model, device=settings.device)
    report = verify(predictor, references)
    print(f"{settings.model} on {predictor.device}\n{report.table()}", file=sys.stderr)
    write_json(report.to_dict() | {"device": predictor.device}, settings.json)
    report.require()
    print(f"{settings.model}: detects what the model detects", file=sys.stderr)
    return 0
