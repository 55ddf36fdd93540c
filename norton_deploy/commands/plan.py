"""Make a compression plan for a budget: MACs, parameters, latency or speed-up on this machine's ONNX Runtime."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import command_line, write_json
from norton_deploy.config import parse_settings
from norton_deploy.cost.form_tuning import CPU, TimingTable
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write, check_output_file
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.plan_report import plan_report, verdict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.search.budget import Budget
from norton_deploy.search.decisions import RANKS
from norton_deploy.search.pareto import draw_pareto
from norton_deploy.search.plan_record import plan_record
from norton_deploy.search.plan_search import PlanRequest, find_plan


@dataclass(kw_only=True)
class Settings:
    """Settings of tools/plan.py."""

    model: str
    """Dense model: an architecture, a .safetensors checkpoint or torchvision's .pth."""
    budget: str
    """macs=0.2 or params=0.5 (shares of the dense model's), latency_ms=400 or speedup=4."""
    data: Path
    """Folder with images (labels are not used); a dataset in COCO's layout will do."""
    out: Path
    """Plan to write (YAML); the report, sensitivities and layer times are kept beside it."""
    image_size: tuple[int, int] | None = None
    """Height and width for MACs and latency; by default the model's own."""
    images: int = 4
    """Images on which sensitivity is measured."""
    sensitivity_size: int = 256
    """Short side of these images in pixels, for a detector: smaller is faster."""
    ranks: tuple[int, ...] = RANKS
    """CP ranks to consider."""
    multiple: int = 16
    """Kept filters are rounded to multiples of this."""
    rounds: int = 8
    """Measured end-to-end calls of each model (latency_ms, speedup)."""
    compare: tuple[Path, ...] = ()
    """Uniform plans to compare with, for example configs/plans/table3.yaml configs/plans/fast.yaml."""
    resume: bool = False
    """Go on with the sensitivities of an earlier run."""
    seed: int = 0
    """Seed of the decompositions."""
    provider: str = CPU
    """ONNX Runtime's execution provider that the latency is for."""
    picture: Path | None = None
    """Pareto picture (PNG); by default beside the plan."""
    report: Path | None = None
    """Report (Markdown); by default beside the plan."""
    json: Path | None = None
    """Write the figures as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="plan", description=__doc__ or "")
    if settings.multiple < 1:
        raise UserError(f"--multiple: expected at least 1, got {settings.multiple}")
    check_output_file(settings.json, "--json")
    request = PlanRequest(
        budget=Budget.parse(settings.budget),
        image_size=settings.image_size,
        data=settings.data,
        images=settings.images,
        sensitivity_size=settings.sensitivity_size,
        sensitivity_file=settings.out.with_suffix(".sensitivity.json"),
        resume=settings.resume,
        ranks=settings.ranks,
        multiple=settings.multiple,
        rounds=settings.rounds,
        seed=settings.seed,
        compare={path.stem: CompressionPlan.load(path) for path in settings.compare},
    )
    origin = provenance()
    machine = {"cpu": origin["machine"]["cpu"], "threads": origin["machine"]["torch_threads"], **origin["versions"]}
    table = TimingTable(settings.out.with_suffix(".times.json"), machine, settings.provider)
    with tqdm(desc="sensitivity", unit="choice", disable=None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = find_plan(
            open_model(settings.model), request, table, report=lambda line: tqdm.write(line, sys.stderr),
            progress=progress,
        )  # fmt: skip
    found.plan.save(settings.out)
    record = {
        "plan": settings.out.name,
        "model": Path(settings.model).name,
        **plan_record(found, request),
        "command": command_line("plan", argv),
        "provenance": origin,
    }
    picture = settings.picture or settings.out.with_suffix(".png")
    draw_pareto(picture, record)
    report = settings.report or settings.out.with_suffix(".md")
    with atomic_write(report, "w") as stream:
        stream.write(plan_report(record, picture).to_markdown(report.parent))
    print(f"{settings.out}: {verdict(record)} Report: {report}", file=sys.stderr)
    write_json(record, settings.json)
    return 0
