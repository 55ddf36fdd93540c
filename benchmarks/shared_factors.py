"""What filters keep that share factors: every form of the family on one trained classifier, at the MACs of rank 1.

Each layer gets the ranks whose MACs come closest from below to those of the filters' CPD at rank 1. Planned classifiers
have these MACs as a whole, and the planner gives every layer its form. Measured is top-1 as decomposed, from the bare
weights, and after the fit to unlabelled images; with --finetune-steps also after a short training with the dense
classifier as teacher, beside the dense one trained alike. A cell that is in the results file is not run again.

    python benchmarks/shared_factors.py --model runs/cifar_gpu/dense-0.safetensors --data runs/cifar
"""

import copy
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import nn

from benchmarks.lib.cells import RESULTS, ResultCells, page, run, settings_of, tabulate
from benchmarks.lib.classifier_recovery import Recovery, RecoverySettings, Teacher, network_nmse, percent
from benchmarks.lib.rank_one import rank_one_plan
from norton_deploy.checkpoints.checkpoint import Checkpoint
from norton_deploy.compression.calibration import Probe, make_probes
from norton_deploy.compression.channel_harm import choose_by_harm
from norton_deploy.compression.compress import Compressed, apply_structure, compress_with_kept
from norton_deploy.compression.factored_conv import Decomposed
from norton_deploy.compression.refit import refit
from norton_deploy.data.image_folder import read_images
from norton_deploy.files import sha256_of
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.reporting.report import Table
from norton_deploy.search.decisions import list_decisions, to_plan
from norton_deploy.search.joint_cost import joint_cost
from norton_deploy.search.latency_budget import Workload
from norton_deploy.search.plan_search import PlanRequest, harm_images
from norton_deploy.search.planner import Planner
from norton_deploy.search.sensitivity import Sensitivity

CLUSTERS = (16, 4)
FORMS = {"filter": "filter CPD (the paper's)", "tucker": "Tucker-2", "layer_cp": "layer CPD"} | {
    f"coupled {count}": f"coupled, {count} clusters" for count in CLUSTERS
}
PLANNED = {
    "planned": "planned, nothing pruned",
    "planned, pruned": "planned and pruned",
    "planned by logits": "planned and pruned by the logits' error",
}
FORMS |= PLANNED
NO_WIDTHS = 1 << 20
"""A multiple of widths that no layer has: nothing can be pruned."""
PROBE_BATCH = 250
JUDGED, FITTED = 32, 256
"""Images of a planner's search: on which logits are judged, and to which choices are fitted."""
TUNED = ", fine-tuned"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/shared_factors.py."""

    model: Path
    """Checkpoint of the trained dense classifier."""
    data: Path
    """Folder with train/CLASS/* and test/CLASS/* (or val/)."""
    forms: tuple[str, ...] = tuple(FORMS)
    """Which forms."""
    images: int = 2000
    """Unlabelled training images for the fit."""
    finetune_steps: int = 0
    """Steps of 128 images for which what was fitted is trained as well; 0 leaves it out."""
    finetune_lr: float = 0.005
    """Peak learning rate of this training."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of this training: no (float32), or bf16 on a CPU with AMX."""
    seed: int = 0
    """Seed of decomposition and of the choice of positions."""
    workers: int = 1
    """Processes that read images."""
    out: Path = RESULTS / "shared_factors.json"
    """Results file; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    runs = Path("runs/shared_factors")
    recovery = Recovery(
        RecoverySettings(
            model=settings.model, data=settings.data, runs=runs, workers=settings.workers, seed=settings.seed,
            steps=settings.finetune_steps, lr=settings.finetune_lr, precision=settings.precision,
        )
    )  # fmt: skip
    tuning = ("finetune_steps", "finetune_lr", "precision")
    key = {
        **settings_of(settings, "forms", "workers", "model", *tuning),
        "model_sha256": sha256_of(settings.model),
        "architecture": recovery.settings.architecture,
        "test_images": len(recovery.val),
        "dense_macs": recovery.before.macs,
    }
    results = ResultCells(settings.out, key, report)
    results.measure("dense", lambda: {"top1": recovery.top1(recovery.dense)})
    cells = {form: partial(measure, recovery, settings, form) for form in settings.forms}
    if settings.finetune_steps:
        wanted = ("dense", *settings.forms)
        cells |= {f"{form}{TUNED}": partial(measure_tuned, recovery, settings, form) for form in wanted}
    return results.measure_all(cells)


def measure_tuned(recovery: Recovery, settings: Settings, form: str) -> dict[str, Any]:
    """One form, or the dense classifier, fitted and then trained with the dense one as teacher."""
    recipe = {"steps": settings.finetune_steps, "lr": settings.finetune_lr, "precision": settings.precision}
    teacher = Teacher(settings.model, weight=0.5, temperature=4.0)
    if form == "dense":
        return {**recipe, "top1_tuned": recovery.fine_tune(copy.deepcopy(recovery.dense), None, form, teacher=teacher)}
    plan = plan_of(recovery, settings, form)
    found = compressed(recovery, settings, plan)
    fit(recovery, settings, found)
    fitted = recovery.top1(found.model)
    tuned = recovery.fine_tune(found.model, plan, form, teacher=teacher)
    return {**recipe, "top1_fitted": fitted, "top1_tuned": tuned}


def compressed(recovery: Recovery, settings: Settings, plan: CompressionPlan) -> Compressed:
    """The classifier by a plan, from the bare weights; which filters go is chosen on images if the plan says so."""
    chosen = None
    if plan.choose == "harm":
        chosen = choose_by_harm(recovery.dense, plan, probes_of(recovery, settings), seed=settings.seed)
    return compress_with_kept(recovery.dense, plan, seed=settings.seed, chosen=chosen)


def fit(recovery: Recovery, settings: Settings, found: Compressed) -> None:
    """Refit a compressed classifier to unlabelled images, in place."""
    refit(found.model, recovery.dense, found.kept, probes_of(recovery, settings), seed=settings.seed)


def probes_of(recovery: Recovery, settings: Settings) -> list[Probe]:
    """The unlabelled images."""
    images = read_images(settings.data / "train", settings.images)
    return list(make_probes(recovery.dense, images, recovery.settings, batch=PROBE_BATCH))


def measure(recovery: Recovery, settings: Settings, form: str) -> dict[str, Any]:
    """One form: its error on the weights, top-1 from the bare weights and fitted to data, and what each takes."""
    dense = recovery.dense
    started = time.perf_counter()
    plan = plan_of(recovery, settings, form)
    plan_s = time.perf_counter() - started
    found = compressed(recovery, settings, plan)
    decompose_s = time.perf_counter() - started - plan_s
    figures: dict[str, Any] = {**recovery.complexity(found.model), "decompose_s": round(decompose_s, 1)}
    if form in PLANNED:
        figures |= {"plan": plan.to_dict(), "plan_s": round(plan_s, 1)}
    errors = {}
    for name, layer in found.model.named_modules():
        if isinstance(layer, Decomposed):
            conv: Any = dense.get_submodule(name)
            weight = conv.weight.detach()
            inputs, outputs = (found.kept.get(side) for side in (reader_of(name, dense), name))
            weight = weight if inputs is None else weight[:, inputs]
            weight = weight if outputs is None else weight[outputs]
            errors[name] = float((layer.dense_weight() - weight).square().sum() / weight.square().sum())
    figures |= network_nmse(dense, errors)
    figures["top1_decomposed"] = recovery.top1(found.model)
    started = time.perf_counter()
    fit(recovery, settings, found)
    figures["fit_s"] = round(time.perf_counter() - started, 1)
    return {**figures, "top1_fitted": recovery.top1(found.model)}


def reader_of(name: str, dense: nn.Module) -> str:
    """The layer whose channels a layer of a chain reads; "" for the first."""
    convolutions = [other for other, layer in dense.named_modules() if isinstance(layer, nn.Conv2d)]
    position = convolutions.index(name)
    return convolutions[position - 1] if position else ""


def plan_of(recovery: Recovery, settings: Settings, form: str) -> CompressionPlan:
    """The plan of a row of the table."""
    return planned(recovery, settings, form) if form in PLANNED else uniform(recovery, form)


def uniform(recovery: Recovery, form: str) -> CompressionPlan:
    """The form in every convolution, all of which are 3x3, at the MACs of rank 1."""
    return rank_one_plan(recovery.dense, recovery.settings.architecture, recovery.settings.image_size, form)


def planned(recovery: Recovery, settings: Settings, form: str) -> CompressionPlan:
    """The planner's choice at the MACs that the filters' CPD at rank 1 has as a whole."""
    dense = recovery.dense
    macs = recovery.complexity(apply_structure(copy.deepcopy(dense), uniform(recovery, "filter")))["macs"]
    request = PlanRequest(
        budget=f"macs={macs / recovery.before.macs}", data=settings.data / "train", images=JUDGED, fit_images=FITTED,
        multiple=NO_WIDTHS if form == "planned" else 16, seed=settings.seed,
    )  # fmt: skip
    by_layer = form != "planned by logits"
    path = Path("runs/shared_factors") / ("harm_by_layer.json" if by_layer else "harm.json")
    images = harm_images(Checkpoint(dense, recovery.header), request)
    sensitivity = Sensitivity(dense, images, by_layer=by_layer, path=path, resume=True, seed=settings.seed)
    decisions = sensitivity.measure(list_decisions(dense, multiple=request.multiple))
    cost = joint_cost(dense, Workload.of(dense, recovery.settings.image_size).calls(dense), "macs")
    choice = Planner(decisions, cost, sensitivity.of_option).within(macs).choice
    return to_plan(choice, decisions, recovery.settings.architecture)


def report(results: ResultCells) -> str:
    """A row per form."""
    cells, settings = results.cells, results.settings
    tuned = {form: cells[f"{form}{TUNED}"] for form in ("dense", *FORMS) if f"{form}{TUNED}" in cells}
    columns: dict[str, Any] = {
        "Form": lambda row: FORMS[row[0]],
        "MACs": lambda row: f"{row[1]['macs'] / 1e6:.2f}M",
        "Params": lambda row: f"{row[1]['params'] / 1e6:.2f}M",
        "NMSE mean / total": lambda row: f"{row[1]['nmse_mean']:.3f} / {row[1]['nmse_total']:.3f}",
        "As decomposed %": lambda row: percent(row[1]["top1_decomposed"]),
        "Fitted to data %": lambda row: percent(row[1]["top1_fitted"]),
        "Decompose / fit s": lambda row: f"{row[1]['decompose_s']:.0f} / {row[1]['fit_s']:.0f}",
    }
    parts: list[Table | str] = [
        tabulate(
            f"{settings['architecture']} at the MACs of rank 1, untrained: dense {percent(cells['dense']['top1'])} %"
            f", {settings['test_images']} test images; fitted to {settings['images']} unlabelled training images",
            [(form, cells[form]) for form in FORMS if form in cells],
            columns,
        )
    ]
    if tuned:
        parts.append(
            tabulate(
                "Fitted, then trained with the dense classifier as teacher",
                tuned.items(),
                {
                    "Form": lambda row: {"dense": "dense, trained alike", **FORMS}[row[0]],
                    "Fitted to data %": lambda row: percent(row[1].get("top1_fitted", cells["dense"]["top1"])),
                    "Steps of 128 images, peak rate": lambda row: f"{row[1]['steps']}, {row[1]['lr']:g}",
                    "Trained %": lambda row: percent(row[1]["top1_tuned"]),
                },
            )
        )
    return page(*parts)


if __name__ == "__main__":
    run(Settings, main)
