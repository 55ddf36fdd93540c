"""Make a compression plan for a budget: MACs, parameters, latency or speed-up on this machine's engine."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import Output, command_line, write_json
from norton_deploy.config import parse_settings
from norton_deploy.files import check_output_file
from norton_deploy.progress import progress_bar
from norton_deploy.reporting.plan_report import verdict, write_plan_report
from norton_deploy.reporting.provenance import machine_values, provenance
from norton_deploy.search.form_tuning import TimingTable
from norton_deploy.search.layer_timing import TimedEngine
from norton_deploy.search.plan_search import PlanRequest, PlanSearch

FIRST = ("image-size", "images", "fit-images", "engine", "forms", "multiple", "compare", "resume", "overwrite", "json")


@dataclass(frozen=True, kw_only=True)
class Settings(PlanRequest, Output):
    """Settings of tools/plan.py."""

    model: str
    """Dense model: an architecture, a .safetensors checkpoint or torchvision's .pth."""
    out: Path
    """Plan to write (YAML); the report, sensitivities and layer times are kept beside it."""
    engine: TimedEngine = "onnxruntime"
    """What the latency is for: onnxruntime or openvino on the CPU, also with -int8, openvino-bf16, onnxruntime-cuda."""
    picture: Path | None = None
    """Pareto picture (PNG); by default beside the plan."""
    report: Path | None = None
    """Report (Markdown); by default beside the plan."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="plan", description=__doc__ or "")
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    out, origin = settings.out, provenance()
    report, picture = settings.report or out.with_suffix(".md"), settings.picture or out.with_suffix(".png")
    for option, file in (("--out", out), ("--report", report), ("--picture", picture)):
        check_output_file(file, option, overwrite=settings.overwrite)
    table = TimingTable(out.with_suffix(".times.json"), machine_values(origin), settings.engine)

    def progress(done: int, _: int) -> None:
        bar.update(done - bar.n)

    search = PlanSearch(
        open_model(settings.model), settings, table, sensitivity_file=out.with_suffix(".sensitivity.json"),
        report=lambda line: tqdm.write(line, sys.stderr), progress=progress,
    )  # fmt: skip
    with progress_bar(desc="harm of choices", unit="group", total=len(search.decisions)) as bar:
        found = search.find()
    found.plan.save(out)
    names = {"plan": out.name, "model": Path(settings.model).name}
    record = {**names, **found.to_dict(), "command": command_line("plan", argv), "provenance": origin}
    write_plan_report(report, record, picture)
    print(f"{out}: {verdict(record)} Report: {report}", file=sys.stderr)
    write_json(record, settings.json)
    return 0
