"""Make a compression plan for a budget: MACs, parameters, latency or speed-up on this machine's ONNX Runtime."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from tqdm import tqdm

from norton_deploy.checkpoint import Checkpoint, build_structure
from norton_deploy.commands import command_line, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.complexity import count_complexity
from norton_deploy.export.layer_calls import layer_calls
from norton_deploy.export.onnx_export import weights_digest
from norton_deploy.export.tuning import CPU, TimingTable
from norton_deploy.model_source import open_model
from norton_deploy.modeling.classifiers import ClassifierSettings
from norton_deploy.modeling.compress import fit_plan
from norton_deploy.modeling.probe import make_probes
from norton_deploy.planning.plan import CompressionPlan
from norton_deploy.reporting.provenance import provenance
from norton_deploy.runtime.predictor import read_image
from norton_deploy.search.decisions import RANKS, Decision, list_decisions, to_plan
from norton_deploy.search.end_to_end import Workload
from norton_deploy.search.joint_cost import JointCost, joint_cost
from norton_deploy.search.latency_budget import LatencySearch
from norton_deploy.search.pareto import Mark, draw_pareto
from norton_deploy.search.planner import Planner, Point
from norton_deploy.search.sensitivity import Sensitivity

KINDS = ("macs", "params", "latency_ms", "speedup")
TIMING_IMAGES = 4


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
    """Plan to write (YAML); sensitivities and layer times are kept beside it."""
    image_size: tuple[int, int] | None = None
    """Height and width for MACs and latency; by default the model's own."""
    images: int = 8
    """Images on which sensitivity is measured."""
    sensitivity_size: int = 320
    """Short side of these images in pixels, for a detector: smaller is faster."""
    ranks: tuple[int, ...] = RANKS
    """CP ranks to consider."""
    multiple: int = 16
    """Kept filters are rounded to multiples of this."""
    rounds: int = 8
    """Measured end-to-end calls of each model (latency_ms, speedup)."""
    compare: Path | None = None
    """A uniform plan to mark in the picture, for example configs/plans/table3.yaml."""
    resume: bool = False
    """Go on with the sensitivities of an earlier run."""
    seed: int = 0
    """Seed of the decompositions."""
    provider: str = CPU
    """ONNX Runtime's execution provider that the latency is for."""
    picture: Path | None = None
    """Write the Pareto picture (PNG)."""
    json: Path | None = None
    """Write the figures as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="plan", description=__doc__ or "")
    kind, amount = parse_budget(settings.budget)
    source = open_model(settings.model)
    if source.header.plan is not None:
        raise UserError(f"{settings.model}: is compressed already; plan for its dense original")
    found = source.header.settings
    is_classifier = isinstance(found, ClassifierSettings)
    if is_classifier and kind in ("latency_ms", "speedup"):
        raise UserError(f"--budget {kind}: end-to-end latency is measured for detectors; use macs or params")
    architecture = found.architecture if isinstance(found, ClassifierSettings) else "rcnn"
    own = found.image_size if isinstance(found, ClassifierSettings) else (found.min_size, found.min_size)
    size = settings.image_size or own
    decisions = list_decisions(source.model, ranks=settings.ranks, multiple=settings.multiple)
    sensitivity = measure_sensitivity(settings, source, architecture, decisions)
    workload = Workload(size, 0, 0) if is_classifier else Workload.of(source.model, size)
    result: dict[str, Any] = {}
    if kind in ("macs", "params"):
        calls = layer_calls(source.model, size, proposals=workload.proposals, detections=workload.detections)
        cost = joint_cost(source.model, calls, kind)  # type: ignore[arg-type]
        point = Planner(decisions, cost, sensitivity.of_option).within(amount * cost.of({}, {}))
    else:
        search = latency_search(settings, source, decisions, sensitivity, workload)
        search.start()
        done = search.find(amount if kind == "latency_ms" else None, amount if kind == "speedup" else None)
        cost, point = search.cost, done.point
        result = {
            "predicted_ms": done.predicted_ms,
            "measured_ms": done.measured_ms,
            "dense_measured_ms": done.dense_ms,
            "predicted_speedup": done.dense_ms / done.predicted_ms,
            "measured_speedup": done.dense_ms / done.measured_ms,
            "prediction_error": done.predicted_ms / done.measured_ms - 1,
        }
    note = f"planned for {settings.budget} at {size[0]} x {size[1]}, model {settings.model}"
    plan = to_plan(point.choice, decisions, architecture, note)
    plan.save(settings.out)
    result = {
        "plan": str(settings.out),
        "budget": settings.budget,
        "image_size": size,
        **complexity(source, plan, workload),
        **result,
        "predicted_harm": point.harm,
        "measured_harm": sensitivity.of_plan(plan),
        "command": command_line("plan", argv),
        "provenance": provenance(),
    }
    if settings.picture is not None:
        mark_plans(settings, source, decisions, sensitivity, cost, point, result)
    print("\n".join(f"{key}: {result[key]}" for key in result if key != "provenance"), file=sys.stderr)
    write_json(result, settings.json)
    return 0


def parse_budget(text: str) -> tuple[str, float]:
    """ "speedup=4" -> ("speedup", 4.0).

    Raises:
        UserError: not one of the four kinds, or an impossible number.
    """
    kind, _, number = text.partition("=")
    try:
        amount = float(number)
    except ValueError:
        amount = -1.0
    if kind not in KINDS or amount <= 0:
        raise UserError(f"--budget {text}: expected macs=0.2, params=0.5, latency_ms=400 or speedup=4")
    if kind in ("macs", "params") and amount > 1:
        raise UserError(f"--budget {text}: a share of the dense model's, between 0 and 1")
    return kind, amount


def measure_sensitivity(
    settings: Settings, source: Checkpoint, architecture: str, decisions: list[Decision]
) -> Sensitivity:
    """Harm of all single choices, going on where an earlier run stopped."""
    found = source.header.settings
    model: Any = source.model
    images = list(read_images(settings.data, settings.images))
    if isinstance(found, ClassifierSettings):
        probes = list(make_probes(model, images, found))
    else:
        full = model.transform.min_size, model.transform.max_size
        model.transform.min_size = (settings.sensitivity_size,)
        model.transform.max_size = settings.sensitivity_size * found.max_size // found.min_size
        probes = list(make_probes(model, images, found))
        model.transform.min_size, model.transform.max_size = full
    identity = {
        "weights": weights_digest(model),
        "images": [str(path) for path in islice(find_images(settings.data), settings.images)],
        "size": settings.sensitivity_size,
        "seed": settings.seed,
    }
    sensitivity = Sensitivity(
        model, architecture, probes, path=settings.out.with_suffix(".sensitivity.json"), identity=identity,
        resume=settings.resume, seed=settings.seed,
    )  # fmt: skip
    with tqdm(total=Sensitivity.count(decisions), desc="sensitivity", unit="choice", disable=None) as bar:
        sensitivity.measure(decisions, lambda _: _advance(bar))
    return sensitivity


def _advance(bar: "tqdm[NoReturn]") -> None:
    bar.update()


def latency_search(
    settings: Settings, source: Checkpoint, decisions: list[Decision], sensitivity: Sensitivity, workload: Workload
) -> LatencySearch:
    """A search with this machine's layer times, kept beside the plan."""
    origin = provenance()
    machine = {"cpu": origin["machine"]["cpu"], "threads": origin["machine"]["torch_threads"], **origin["versions"]}
    table = TimingTable(settings.out.with_suffix(".times.json"), machine, settings.provider)
    pictures = [np.asarray(read_image(path)) for path in find_images(settings.data)[:TIMING_IMAGES]]
    return LatencySearch(
        source.model, decisions, sensitivity.of_option, workload, source.header.categories, pictures, table,
        rounds=settings.rounds, seed=settings.seed, report=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip


def complexity(source: Checkpoint, plan: CompressionPlan, workload: Workload) -> dict[str, int]:
    """MACs and parameters, dense and planned."""
    small = build_structure(replace(source.header, plan=plan))
    counted = {
        name: count_complexity(model, workload.image_size, proposals=workload.proposals, detections=workload.detections)
        for name, model in (("", small), ("dense_", source.model))
    }
    return {f"{name}{field}": getattr(found, field) for name, found in counted.items() for field in ("macs", "params")}


def mark_plans(
    settings: Settings,
    source: Checkpoint,
    decisions: list[Decision],
    sensitivity: Sensitivity,
    cost: JointCost,
    point: Point,
    result: dict[str, Any],
) -> None:
    """Draw the front with the plan and, if given, a uniform plan on it; adds their figures to `result`."""
    assert settings.picture is not None
    dense_cost = cost.of({}, {})
    front = Planner(decisions, cost, sensitivity.of_option).frontier()
    marks = [Mark("this plan", dense_cost / point.cost, result["measured_harm"])]
    if settings.compare is not None:
        uniform = fit_plan(source.model, CompressionPlan.load(settings.compare))
        marks.insert(0, Mark(settings.compare.stem, dense_cost / cost.of_plan(uniform), sensitivity.of_plan(uniform)))
    kind = settings.budget.partition("=")[0]
    axis = {"macs": "reduction of MACs", "params": "reduction of parameters"}.get(kind, "speed-up")
    draw_pareto(settings.picture, front, dense_cost, axis, marks)
    result["marks"] = [vars(mark) for mark in marks]
    result["frontier"] = [{"ratio": dense_cost / found.cost, "predicted_harm": found.harm} for found in front]
