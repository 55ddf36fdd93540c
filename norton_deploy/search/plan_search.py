"""From a dense model and a budget to a plan: sensitivities, search, measurement, and where uniform plans stand."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from norton_deploy.checkpoints.checkpoint import Checkpoint, build_structure, tensors_digest
from norton_deploy.compression.calibration import PROBE_BATCH, make_probes
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.errors import UserError
from norton_deploy.method.plan import FORMS, CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.search.decisions import RANKS, list_decisions, to_plan, untouched
from norton_deploy.search.form_tuning import TimingTable, tune_blocks
from norton_deploy.search.found_plan import FoundPlan, layer_choices
from norton_deploy.search.joint_cost import UNITS, Budget, joint_cost
from norton_deploy.search.latency_budget import LatencyResult, LatencySearch, Workload
from norton_deploy.search.planner import Planner
from norton_deploy.search.sensitivity import HarmImages, Sensitivity

TIMING_IMAGES = 4


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """What to search for, and with which effort.

    Raises:
        UserError: the budget or the multiple is impossible.
    """

    budget: str
    """macs=0.2 or params=0.5 (shares of the dense model's), latency_ms=400 or speedup=4."""
    data: Path
    """Folder with images (labels are not used); a dataset in COCO's layout will do."""
    image_size: tuple[int, int] | None = None
    """Height and width for MACs and latency; by default the model's own."""
    images: int = 4
    """Images on which harm is measured."""
    fit_images: int = 32
    """Other images, to which the choices are fitted first."""
    sensitivity_size: int = 256
    """Short side of these images in pixels, for a detector: smaller is faster."""
    forms: tuple[str, ...] = FORMS
    """Decompositions to consider: ranks (the filters' own CPD), coupled, tucker, layer_cp; none prunes only."""
    ranks: tuple[int, ...] = RANKS
    """CP ranks of filters to consider."""
    multiple: int = 16
    """Kept filters are rounded to multiples of this; one above every layer's width prunes nothing."""
    rounds: int = 8
    """Measured end-to-end calls of each model (latency_ms, speedup)."""
    compare: tuple[Path, ...] = ()
    """Uniform plans to compare with, for example configs/plans/table3.yaml configs/plans/fast.yaml."""
    resume: bool = False
    """Go on with the sensitivities of an earlier run."""
    check_harm: bool = True
    """Also compress and refit by the plan on the images of the fit, and measure its harm as a whole."""
    seed: int = 0
    """Seed of the decompositions."""

    def __post_init__(self) -> None:
        if self.multiple < 1:
            raise UserError(f"--multiple: expected at least 1, got {self.multiple}")
        if unknown := [form for form in self.forms if form not in FORMS]:
            raise UserError(f"--forms: {unknown[0]} is none of {', '.join(FORMS)}")
        Budget.parse(self.budget)


class PlanSearch:
    """The search for the least harmful plan of one dense model within a budget.

    Attributes:
        workload: image size, proposals and detections that every figure is for.
        decisions: what a plan may do to the model.
        sensitivity: harm of single choices.
        seconds: time that each part took so far.
    """

    def __init__(
        self,
        source: Checkpoint,
        request: PlanRequest,
        table: TimingTable,
        *,
        sensitivity_file: Path | None,
        report: Callable[[str], None],
        progress: Callable[[int, int], None],
    ) -> None:
        """
        Args:
            source: dense model in evaluation mode.
            request: budget and effort.
            table: times of layers on the engine that the latency is for; not used for MACs and parameters.
            sensitivity_file: JSON that the sensitivities are kept in.
            report: gets a line for each step of a latency search.
            progress: called with (done, all) channel groups whose choices are measured.

        Raises:
            UserError: the model is compressed already, a latency is asked of a classifier, a plan to compare with
                does not fit, or see `check_budget`.
        """
        if source.header.plan is not None:
            raise UserError("the model is compressed already; plan for its dense original")
        self.source, self.request, self.table = source, request, table
        self.report, self.progress = report, progress
        self.budget = Budget.parse(request.budget)
        settings = source.header.settings
        if source.header.task == "cls" and self.budget.measure == "latency_ms":
            raise UserError(f"--budget {self.budget}: latency is measured for detectors; use macs or params")
        self.architecture = settings.architecture if source.header.task == "cls" else "rcnn"
        self.workload = Workload.of(source.model, request.image_size or settings.input_size)
        plans = {path.stem: CompressionPlan.load(path) for path in request.compare}
        self.uniform = {name: fit_plan(source.model, plan) for name, plan in plans.items()}
        self.decisions = list_decisions(
            source.model, forms=request.forms, ranks=request.ranks, multiple=request.multiple
        )
        check_budget(source.model, replace(request, image_size=self.workload.image_size))
        self.seconds: dict[str, float] = {}
        with self._clock("sensitivity"):
            self.sensitivity = Sensitivity(
                source.model, harm_images(source, request), by_layer=source.header.task == "cls", path=sensitivity_file,
                resume=request.resume, seed=request.seed,
            )  # fmt: skip

    def find(self) -> FoundPlan:
        """Measure harms, search the plan, and measure what it does.

        Raises:
            UserError: the budget is too small.
        """
        model, workload, measure = self.source.model, self.workload, self.budget.measure
        harm = self.sensitivity.of_option
        with self._clock("sensitivity"):
            self.decisions = self.sensitivity.measure(self.decisions, self.progress)
        choices = sum(len(decision.forms) + len(decision.widths) - 2 for decision in self.decisions)
        with self._clock("search"):
            latency = self._within_latency() if measure == "latency_ms" else None
            cost = latency.cost if latency else joint_cost(model, workload.calls(model), measure)
            planner = Planner(self.decisions, cost, harm)
            dense_cost = cost.of({}, {})
            point = latency.point if latency else planner.within(self.budget.amount * dense_cost)
        note = f"planned for {self.budget} at {workload.image_size[0]} x {workload.image_size[1]}"
        plan = to_plan(point.choice, self.decisions, self.architecture, note)
        small = build_structure(replace(self.source.header, plan=plan))
        tunings = tune_blocks(workload.calls(small), self.table, workload.calls(model)) if latency else []
        layers = layer_choices(model, self.decisions, point.choice, cost, harm, UNITS[measure], tunings)
        with self._clock("comparison"):
            measured_harm = self.sensitivity.of_plan(plan) if self.request.check_harm else None
            uniform = [self._compare(name, other, planner) for name, other in self.uniform.items()]
            front = planner.frontier()
        return FoundPlan(
            plan=plan,
            budget=self.budget,
            point=point,
            dense_cost=dense_cost,
            workload=workload,
            dense=workload.complexity(model),
            small=workload.complexity(small),
            latency=latency,
            measured_harm=measured_harm,
            images=sum(len(probe.pixels) for probe in self.sensitivity.probes),
            fit_images=sum(len(probe.pixels) for probe in self.sensitivity.fit_probes),
            short_side=min(workload.image_size) if self.sensitivity.by_layer else self.request.sensitivity_size,
            choices=choices,
            layers=layers,
            front=front,
            uniform=uniform,
            by_layer=self.sensitivity.by_layer,
            seconds=self.seconds,
        )

    def _within_latency(self) -> LatencyResult:
        pictures = [np.asarray(read_image(path)) for path in find_images(self.request.data)[:TIMING_IMAGES]]
        search = LatencySearch(
            self.source.model, self.decisions, self.sensitivity.of_option, self.workload, self.source.header.categories,
            pictures, self.table, rounds=self.request.rounds, seed=self.request.seed, report=self.report,
        )  # fmt: skip
        search.start()
        return search.find(self.budget)

    def _compare(self, label: str, plan: CompressionPlan, planner: Planner) -> dict[str, Any]:
        """Measure the harm of a fitted uniform plan and of the planner's plan at the same predicted cost."""
        cost, dense_cost, planned = planner.cost.of_plan(plan), planner.cost.of({}, {}), None
        if planner.solve(math.inf, untouched(self.decisions)).cost <= cost:
            point = planner.within(cost)
            found = to_plan(point.choice, self.decisions, self.architecture)
            planned = {
                "ratio": dense_cost / point.cost,
                "predicted_harm": point.harm,
                "measured_harm": self.sensitivity.of_plan(found),
            }
        harm = self.sensitivity.of_plan(plan)
        return {"label": label, "ratio": dense_cost / cost, "measured_harm": harm, "planned_at_equal_cost": planned}

    @contextmanager
    def _clock(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


def check_budget(model: nn.Module, request: PlanRequest) -> None:
    """Say before the harms are measured, which takes long, that no plan is so small; times are only known later.

    Args:
        model: dense.
        request: with its image size.

    Raises:
        UserError: the smallest plan has more MACs or parameters.
    """
    budget = Budget.parse(request.budget)
    if budget.measure == "latency_ms" or request.image_size is None:
        return
    decisions = list_decisions(model, forms=request.forms, ranks=request.ranks, multiple=request.multiple)
    cost = joint_cost(model, Workload.of(model, request.image_size).calls(model), budget.measure)
    Planner(decisions, cost, lambda *_: 0.0).smallest(budget.amount * cost.of({}, {}))


def harm_images(source: Checkpoint, request: PlanRequest) -> HarmImages:
    """The images on which harm is measured, one per batch so that no padding is computed, and those of the fit; of few
    images half for either.

    Raises:
        UserError: there are fewer than two images.
    """
    header, wanted = source.header, request.images + request.fit_images
    images = list(read_images(request.data, wanted))
    if len(images) < 2:
        raise UserError(f"{request.data}: one image; harm is measured on other images than those of the fit")
    settings = header.settings
    if isinstance(settings, DetectorSettings):
        settings = settings.with_short_side(request.sensitivity_size)
    count = min(request.images, len(images) // 2)
    judged, fitted = images[:count], images[count:]
    one = 1 if header.task != "cls" else PROBE_BATCH
    read = {f"{number:04d}": image for number, image in enumerate(images)}
    return HarmImages(
        judged=tuple(make_probes(source.model, judged, settings, batch=one)),
        fitted=tuple(make_probes(source.model, fitted, settings)),
        digest=tensors_digest(read, f"{settings} {count}".encode()),
    )
