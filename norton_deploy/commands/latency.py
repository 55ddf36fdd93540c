"""Time detectors in turn on images of one's own: checkpoints, graphs or engines, decoding included."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.deployment.measurement import timed_images
from norton_deploy.errors import UserError
from norton_deploy.files import check_output_file
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Backend
from norton_deploy.reporting.latency import measure_alternating
from norton_deploy.reporting.provenance import provenance


@dataclass(frozen=True)
class Settings(Output):
    """Settings of tools/latency.py."""

    models: tuple[Path, ...]
    """Checkpoints, .onnx or .engine files; speed-ups are over the first."""
    data: Path
    """Folder in COCO-2017's layout: images of val2017/ are used."""
    rounds: int = 20
    """Timed calls of each model."""
    backend: Backend | None = None
    """What runs .onnx files: onnxruntime (the default) or openvino."""
    device: str | None = None
    """cpu, cuda or cuda:N; by default a GPU if there is one."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="latency", description=__doc__ or "")
    if not settings.models:
        raise UserError("--models: expected one or several models after it")
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    predictors = {
        str(file): load_predictor(
            file, device=settings.device, backend=settings.backend if file.suffix == ".onnx" else None
        )
        for file in settings.models
    }
    run = measure_alternating(predictors, timed_images(settings.data), rounds=settings.rounds)
    names, summaries = list(predictors), {name: run.summary(name) for name in predictors}
    for name, summary in summaries.items():
        print(
            f"{name}: p50 {summary.p50_ms:.1f} ms, p90 {summary.p90_ms:.1f} ms one image alone, "
            f"{summary.throughput_fps:.2f} images/s in a stream"
        )
    speedups = {name: run.speedup(names[0], name) for name in names[1:]}
    for name, speedup in speedups.items():
        print(f"{name} against {names[0]}: {speedup.verdict}")
    figures = {
        "latency": {name: summary.to_dict() for name, summary in summaries.items()},
        "speedup": {name: speedup.to_dict() for name, speedup in speedups.items()},
        "provenance": provenance(),
    }
    write_json(figures, settings.json)
    return 0
