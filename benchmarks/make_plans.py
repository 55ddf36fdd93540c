"""Makes plans for torchvision's widths: harm from a trained detector with narrower heads, times from this machine.

The plans of configs/plans are for ResNet-50-FPN detectors at 800 pixels, for which there are no trained weights here.
Harm is measured on a trained detector whose body has the same widths and whose pyramid and heads are narrower, with the
same shares of filters and ranks; times are those of the full-size detector (random weights) in ONNX Runtime.
A keypoint head that the trained detector does not have is taken over from --keypoint-from. What is measured stays below
--work, so a stopped run goes on.

    python benchmarks/make_plans.py --model runs/mask/last.safetensors --data runs/data --plans fast=4.7 fastest=7
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, run, settings_of, tabulate
from benchmarks.lib.random_detectors import WorkSettings, timing_table
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.errors import UserError
from norton_deploy.files import sha256_of
from norton_deploy.inference.predictor import read_image
from norton_deploy.method.plan import DENSE, CompressionPlan, Decomposition
from norton_deploy.search.decisions import Decision, list_decisions
from norton_deploy.search.joint_cost import Budget
from norton_deploy.search.latency_budget import LatencySearch
from norton_deploy.search.plan_search import PlanRequest, harm_images
from norton_deploy.search.planner import Harm
from norton_deploy.search.sensitivity import Sensitivity

KEYPOINT_HEAD = "roi_heads.keypoint_"


@dataclass(frozen=True, kw_only=True)
class Settings(WorkSettings):
    """Settings of benchmarks/make_plans.py."""

    model: Path
    """Trained dense detector (.safetensors) that harm is measured on."""
    data: Path
    """Dataset in COCO's layout that it was trained on."""
    plans: tuple[str, ...] = ("balanced=3", "fast=4.7", "fastest=7")
    """Name and speed-up of each plan."""
    keypoint_from: Path = PLANS / "fast_keypoint.yaml"
    """Plan that the keypoint head is taken over from."""
    harm_images: int = 8
    """Images on which harm is measured."""
    fit_images: int = 32
    """Images to which the choices are fitted."""
    rounds: int = 8
    """Measured end-to-end calls of each plan."""
    plans_out: Path = Path("runs/make_plans")
    """Folder for the plans (.yaml)."""
    work: Path = Path("runs/make_plans")
    """Folder for prepared images, layer times and harms."""
    out: Path = RESULTS / "make_plans.json"
    """Results; a .md is written beside it."""


def main(settings: Settings) -> int:
    """Make the plans that are missing."""
    trained = load_checkpoint(settings.model)
    settings.work.mkdir(parents=True, exist_ok=True)
    request = PlanRequest(
        budget="speedup=2", data=settings.data / "train2017", images=settings.harm_images,
        fit_images=settings.fit_images, sensitivity_size=trained.header.detector.image.min_size,
    )  # fmt: skip
    judging = harm_images(trained, request)
    sensitivity = Sensitivity(trained.model, judging, path=settings.work / "harm.json", resume=True)
    narrow = sensitivity.measure(list_decisions(trained.model), partial(say, "harm of choices"))
    images, images_are = settings.prepare_images(settings.work)
    task: Any = trained.header.task
    dense, categories = settings.random_detector(task, images)
    decisions, harm = shared_shares(list_decisions(dense), narrow, sensitivity.of_option)
    search = LatencySearch(
        dense, decisions, harm, settings.workload, categories, [read_image(path) for path in images],
        timing_table(settings.work), rounds=settings.rounds, seed=0, report=lambda line: say(line),
    )  # fmt: skip
    search.start()
    left_out = ("model", "data", "plans", "plans_out", "keypoint_from")
    key = {**settings_of(settings, *left_out), "model_sha256": sha256_of(settings.model), "timed_images": images_are}
    cells = {text: partial(make, settings, search, text, task) for text in settings.plans}
    return ResultCells(settings.out, key, report).measure_all(cells)


def make(settings: Settings, search: LatencySearch, text: str, task: str) -> dict[str, Any]:
    """One plan: searched, completed by a keypoint head, written."""
    name, _, speedup = text.partition("=")
    found = search.find(Budget.parse(f"speedup={speedup}"))
    height, width = settings.image_size
    note = (
        f"Made by benchmarks/make_plans.py for {speedup} times the speed of the dense {task} detector in ONNX Runtime "
        f"on a CPU at {height} x {width}; harm from a detector with a narrower pyramid and heads. To be refitted to "
        "data (compress --refit)."
    )
    plan = replace(found.plan, note=note)
    if not any(decision.group.startswith(KEYPOINT_HEAD) for decision in search.decisions):
        other = CompressionPlan.load(settings.keypoint_from)
        ranks, keep = (
            {**own, **{layer: value for layer, value in more.items() if layer.startswith(KEYPOINT_HEAD)}}
            for own, more in ((plan.ranks, other.ranks), (plan.keep, other.keep))
        )
        plan = replace(plan, ranks=ranks, keep=keep, note=f"{note} Keypoint head of {settings.keypoint_from.stem}.")
    settings.plans_out.mkdir(parents=True, exist_ok=True)
    plan.save(settings.plans_out / f"{name}.yaml")
    counted = settings.workload.complexity(search.dense).macs
    return {
        "plan": plan.to_dict(), "dense_ms": found.dense_ms, "predicted_ms": found.point.cost,
        "measured_ms": found.measured_ms, "speedups": found.speedups.tolist(), "harm": found.point.harm,
        "dense_macs": counted,
    }  # fmt: skip


def shared_shares(full: Sequence[Decision], narrow: Sequence[Decision], harm: Harm) -> tuple[list[Decision], Harm]:
    """Decisions about a full-size detector with only those forms whose likeness was measured on the narrow one, and
    their harm: that of the form with the nearest share of its layer's channels, and of the nearest share of filters.

    A layer that the narrower head does not have counts as the last of those that it has.

    Args:
        full: all decisions about the full-size detector.
        narrow: measured decisions about the other.
        harm: of the narrow one's options.
    """
    by_group = {decision.group: decision for decision in narrow}
    forms: dict[tuple[str, Decomposition], Decomposition] = {}
    widths: dict[tuple[str, int], int] = {}
    decisions, twins = [], {}
    for decision in full:
        twin = twins[decision.group] = by_group.get(decision.group) or last_of_head(decision.group, narrow)
        kept = [DENSE]
        forms[decision.group, DENSE] = DENSE
        for form in decision.forms[1:]:
            alike = [other for other in twin.forms if other.form == form.form]
            if not alike:
                continue
            nearest = min(alike, key=lambda other: apart(shares(form, decision), shares(other, twin)))
            if apart(shares(form, decision), shares(nearest, twin)) < math.log(1.3):
                forms[decision.group, form] = nearest
                kept.append(form)
        for width in decision.widths:
            share = width / decision.widths[0]
            widths[decision.group, width] = min(twin.widths, key=lambda other: abs(other / twin.widths[0] - share))
        decisions.append(replace(decision, forms=tuple(kept)))

    def full_harm(group: str, form: Decomposition, keep: int) -> float:
        return harm(twins[group].group, forms[group, form], widths[group, keep])

    return decisions, full_harm


def last_of_head(group: str, narrow: Sequence[Decision]) -> Decision:
    """The last decision about the head that a group's layer belongs to.

    Raises:
        UserError: there is none.
    """
    head = ".".join(group.split(".")[:2])
    found = [decision for decision in narrow if decision.group.startswith(head)]
    if not found:
        raise UserError(f"'{group}': the trained detector has no such head; train one of the same task")
    return found[-1]


def shares(form: Decomposition, decision: Decision) -> tuple[float, ...]:
    """Ranks of channels as shares of the layer's channels; the ranks of single filters and clusters as they are."""
    inputs, outputs = decision.reads[0][1], decision.widths[0]
    whole = {"tucker": (inputs, outputs), "layer_cp": (max(inputs, outputs),), "coupled": (inputs, 1)}
    return tuple(number / size for number, size in zip(form.numbers, whole.get(form.form, (1,)), strict=True))


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """Largest ratio of two lists of shares, as a logarithm."""
    return max(abs(math.log(a / b)) for a, b in zip(one, other, strict=True))


def say(line: str, *numbers: int) -> None:
    """A line of progress."""
    print(line, "/".join(map(str, numbers)), file=sys.stderr, flush=True)


def report(results: ResultCells) -> str:
    """A row per plan: budget, prediction and measurement."""
    columns: dict[str, Callable[[tuple[str, Cell]], str]] = {
        "Plan": lambda row: row[0],
        "Dense ms": lambda row: f"{row[1]['dense_ms']:.0f}",
        "Predicted ms": lambda row: f"{row[1]['predicted_ms']:.0f}",
        "Measured ms": lambda row: f"{row[1]['measured_ms']:.0f}",
        "Speed-up": lambda row: f"{row[1]['dense_ms'] / row[1]['measured_ms']:.2f}",
        "Predicted harm": lambda row: f"{row[1]['harm']:.2f}",
    }
    caption = f"Plans by planned speed-up; timed on {results.settings['timed_images']}"
    return tabulate(caption, results.cells.items(), columns).to_markdown()


if __name__ == "__main__":
    run(Settings, main)
