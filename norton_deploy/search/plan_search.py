"""From a dense model and a budget to a plan: sensitivities, search, measurement, and where other plans stand."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from torch import nn

from norton_deploy.checkpoints.checkpoint import Checkpoint, build_structure
from norton_deploy.compression.compress import fit_plan
from norton_deploy.compression.probe import Probe, make_probes
from norton_deploy.cost.complexity import Complexity, count_complexity
from norton_deploy.cost.form_tuning import TimingTable, tune_blocks
from norton_deploy.cost.layer_calls import LayerCall, layer_calls
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import read_image
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.search.budget import Budget, Kind
from norton_deploy.search.decisions import Decision, list_decisions, to_plan
from norton_deploy.search.end_to_end import Workload
from norton_deploy.search.joint_cost import JointCost, joint_cost
from norton_deploy.search.latency_budget import LatencyResult, LatencySearch
from norton_deploy.search.layer_choices import LayerChoice, layer_choices
from norton_deploy.search.planner import Planner, Point
from norton_deploy.search.rivals import Rival, compare_uniform
from norton_deploy.search.sensitivity import Sensitivity

TIMING_IMAGES = 4
UNITS: dict[Kind, str] = {"macs": "MACs", "params": "parameters", "latency_ms": "ms", "speedup": "ms"}


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to search for, and with which effort.

    Attributes:
        budget: what the plan may cost.
        image_size: (height, width) for MACs and latency; None: the model's own.
        data: folder with images.
        images: number of images on which sensitivity is measured.
        sensitivity_size: short side in pixels of these images, for a detector.
        sensitivity_file: JSON that the sensitivities are kept in.
        resume: go on with that file.
        ranks: CP ranks to consider.
        multiple: kept filters are multiples of this.
        rounds: measured end-to-end calls of each model.
        seed: of the decompositions.
        compare: name -> uniform plan to compare with.
    """

    budget: Budget
    image_size: tuple[int, int] | None
    data: Path
    images: int
    sensitivity_size: int
    sensitivity_file: Path
    resume: bool
    ranks: tuple[int, ...]
    multiple: int
    rounds: int
    seed: int
    compare: Mapping[str, CompressionPlan]


@dataclass(frozen=True, kw_only=True)
class FoundPlan:
    """A plan and all that is known about it.

    Attributes:
        plan: the plan.
        point: its joint choice with the predicted cost and harm.
        dense_cost: cost of the dense model.
        unit: of costs: MACs, parameters or ms.
        workload: image size, proposals and detections that every figure is for.
        dense, small: MACs and parameters of the dense and the planned model.
        latency: measured end to end; None for budgets of MACs or parameters.
        measured_harm: of the plan as a whole.
        layers: the choice for every convolution that could be decomposed.
        front: undominated choices, by rising cost.
        rivals: the uniform plans to compare with.
        choices: number of single choices whose harm was measured.
        seconds: time that each part of the search took.
    """

    plan: CompressionPlan
    point: Point
    dense_cost: float
    unit: str
    workload: Workload
    dense: Complexity
    small: Complexity
    latency: LatencyResult | None
    measured_harm: float
    layers: list[LayerChoice]
    front: list[Point]
    rivals: list[Rival]
    choices: int
    seconds: dict[str, float] = field(default_factory=dict)


def find_plan(
    source: Checkpoint,
    request: PlanRequest,
    table: TimingTable,
    *,
    report: Callable[[str], None],
    progress: Callable[[int, int], None],
) -> FoundPlan:
    """Search the least harmful plan within a budget.

    Args:
        source: dense model in evaluation mode.
        request: budget and effort.
        table: times of layers on the engine that the latency is for; not used for MACs and parameters.
        report: gets a line for each step of a latency search.
        progress: called with (done, all) single choices whose harm is known.

    Raises:
        UserError: the model is compressed already, a latency is asked of a classifier, the budget is too small, or
            a plan to compare with does not fit.
    """
    if source.header.plan is not None:
        raise UserError("the model is compressed already; plan for its dense original")
    found = source.header.settings
    if source.header.task == "cls":
        if request.budget.is_latency:
            raise UserError(f"--budget {request.budget}: latency is measured for detectors; use macs or params")
        architecture: str = found.architecture
        workload = Workload(request.image_size or found.input_size, 0, 0)
    else:
        architecture = "rcnn"
        workload = Workload.of(source.model, request.image_size or found.input_size)
    uniform = {name: fit_plan(source.model, plan) for name, plan in request.compare.items()}
    seconds: dict[str, float] = {}
    decisions = list_decisions(source.model, ranks=request.ranks, multiple=request.multiple)
    with _clock(seconds, "sensitivity"):
        sensitivity = Sensitivity(
            source.model, architecture, make_sensitivity_probes(source, request),
            path=request.sensitivity_file, resume=request.resume, seed=request.seed,
        )  # fmt: skip
        total = Sensitivity.count(decisions)
        sensitivity.measure(decisions, lambda done: progress(done, total))
    latency: LatencyResult | None = None
    with _clock(seconds, "search"):
        if request.budget.is_latency:
            latency, cost = _latency(source, request, decisions, sensitivity, workload, table, report)
            point = latency.point
        else:
            cost, point = _counted(source, request, decisions, sensitivity, workload)
    plan = to_plan(point.choice, decisions, architecture, f"planned for {request.budget} at {_pixels(workload)}")
    small = build_structure(replace(source.header, plan=plan))
    planner = Planner(decisions, cost, sensitivity.of_option)
    tunings = tune_blocks(_calls(small, workload), table, _calls(source.model, workload)) if latency else []
    with _clock(seconds, "comparison"):
        return FoundPlan(
            plan=plan,
            point=point,
            dense_cost=cost.of({}, {}),
            unit=UNITS[request.budget.kind],
            workload=workload,
            dense=_complexity(source.model, workload),
            small=_complexity(small, workload),
            latency=latency,
            measured_harm=sensitivity.of_plan(plan),
            layers=layer_choices(
                source.model, decisions, point.choice, cost, sensitivity.of_option, UNITS[request.budget.kind], tunings
            ),
            front=planner.frontier(),
            rivals=[compare_uniform(name, other, planner, sensitivity) for name, other in uniform.items()],
            choices=total,
            seconds=seconds,
        )


def make_sensitivity_probes(source: Checkpoint, request: PlanRequest) -> list[Probe]:
    """The images on which harm is measured, one per batch so that no padding is computed."""
    header, images = source.header, read_images(request.data, request.images)
    if header.task == "cls":
        return list(make_probes(source.model, images, header.settings))
    found, side = header.detector, request.sensitivity_size
    reduced = replace(found.image, min_size=side, max_size=side * found.image.max_size // found.image.min_size)
    return list(make_probes(source.model, images, replace(found, image=reduced), batch=1))


def _latency(
    source: Checkpoint,
    request: PlanRequest,
    decisions: list[Decision],
    sensitivity: Sensitivity,
    workload: Workload,
    table: TimingTable,
    report: Callable[[str], None],
) -> tuple[LatencyResult, JointCost]:
    pictures = [np.asarray(read_image(path)) for path in find_images(request.data)[:TIMING_IMAGES]]
    search = LatencySearch(
        source.model, decisions, sensitivity.of_option, workload, source.header.categories, pictures, table,
        rounds=request.rounds, seed=request.seed, report=report,
    )  # fmt: skip
    search.start()
    return search.find(request.budget), search.cost


def _counted(
    source: Checkpoint, request: PlanRequest, decisions: list[Decision], sensitivity: Sensitivity, workload: Workload
) -> tuple[JointCost, Point]:
    cost = joint_cost(
        source.model, _calls(source.model, workload), cast(Literal["macs", "params"], request.budget.kind)
    )
    limit = request.budget.amount * cost.of({}, {})
    return cost, Planner(decisions, cost, sensitivity.of_option).within(limit)


def _calls(model: nn.Module, workload: Workload) -> list[LayerCall]:
    return layer_calls(model, workload.image_size, proposals=workload.proposals, detections=workload.detections)


def _complexity(model: Any, workload: Workload) -> Complexity:
    return count_complexity(model, workload.image_size, proposals=workload.proposals, detections=workload.detections)


def _pixels(workload: Workload) -> str:
    return " x ".join(map(str, workload.image_size))


@contextmanager
def _clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started
