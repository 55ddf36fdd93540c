"""What makes the small model: a plan, its compression, its fine-tuning; and what makes graphs and engines of models."""

import shlex
from collections.abc import Callable
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, cast

import torch

from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.data.image_folder import find_images, read_images
from norton_deploy.deployment.request import DeployRequest, EngineTarget
from norton_deploy.export.contract import Precision
from norton_deploy.export.tensorrt_build import EngineManifest, build_or_explain
from norton_deploy.inference.predictor import read_image
from norton_deploy.method.plan import FORMS, CompressionPlan
from norton_deploy.parity.engine_check import check_engine
from norton_deploy.parity.export_checked import ExportOptions, export_checked, open_detector
from norton_deploy.reporting.provenance import machine_values, provenance
from norton_deploy.search.form_tuning import TimingTable
from norton_deploy.search.layer_timing import TimedEngine
from norton_deploy.search.plan_search import PlanRequest, PlanSearch
from norton_deploy.structures import Task
from norton_deploy.training.detector_training import DetectorTrainingSettings, train_detector
from norton_deploy.training.run_folder import RunFolder

Report = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def tool(name: str, *arguments: object, **options: object) -> str:
    """A command line for a shell, quoted.

    Args:
        name: of the command.
        arguments: as they stand.
        options: name -> value; None and False are left out, True is a flag, of tuples every part is a word.
    """
    words = ["norton", name, *map(str, arguments)]
    for option, value in options.items():
        if value is None or value is False:
            continue
        words.append(f"--{option.replace('_', '-')}")
        if value is not True:
            words += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


def plan_request(request: DeployRequest, data: Path, image_size: tuple[int, int], resume: bool) -> PlanRequest:
    """The search that a deployment makes: for measured time, or for MACs in a quick run and where time cannot be
    measured here."""
    effort, by_time = request.effort, request.effort.by_time and EngineTarget.parse(request.target).engine is None
    return PlanRequest(
        budget=f"speedup={request.speedup:g}" if by_time else f"macs={1 / request.speedup:.4g}",
        data=data / "train2017",
        image_size=image_size,
        images=effort.plan_images,
        fit_images=effort.plan_fit_images,
        sensitivity_size=effort.plan_side,
        forms=("tucker",) if request.quick else FORMS,
        ranks=effort.ranks,
        multiple=effort.multiple,
        rounds=effort.rounds,
        resume=resume,
        check_harm=False,
        seed=request.seed,
    )


def timed_engine(target: EngineTarget, precision: Precision) -> TimedEngine:
    """What a plan for this target is timed on; in 8 bits where its graph has them."""
    if precision == "int8" and target.graph == "onnxruntime":
        return "openvino-int8" if target.backend == "openvino" else "onnxruntime-int8"
    return "openvino" if target.backend == "openvino" else "onnxruntime"


def search_plan(
    dense: Path, request: PlanRequest, engine: TimedEngine, out: Path, report: Report, progress: Progress
) -> dict[str, Any]:
    """Search a plan and write it (YAML); what was measured is kept beside it. Returns `FoundPlan.to_dict`."""
    table = TimingTable(out.with_suffix(".times.json"), machine_values(provenance()), engine)
    search = PlanSearch(
        load_checkpoint(dense), request, table, sensitivity_file=out.with_suffix(".sensitivity.json"),
        report=lambda line: report(f"    {line}"),
        progress=lambda done, count: progress("harm of choices", done, count),
    )  # fmt: skip
    found = search.find()
    found.plan.save(out)
    return found.to_dict()


def compress_file(
    dense: Path, plan: Path, out: Path, request: DeployRequest, data: Path, command: str, progress: Progress
) -> dict[str, Any]:
    """Compress a checkpoint by a plan, refit it on unlabelled training images, and write it."""
    effort = request.effort
    done: dict[str, int] = {}

    def advance(stage: str, layer: str, layers: int) -> None:
        done[stage] = done.get(stage, 0) + 1
        progress(stage, done[stage], layers)

    images = read_images(data / "train2017", effort.refit_images) if effort.refit_images else None
    small = compress_checkpoint(
        load_checkpoint(dense), CompressionPlan.load(plan), command=command, source=dense, seed=request.seed,
        choose=None if images else "angles", refit_images=images, refit_side=effort.refit_side, progress=advance,
    )  # fmt: skip
    save_checkpoint(out, small.model, small.header)
    return {}


def finetune_settings(
    request: DeployRequest, task: Task, data: Path, small: Path, dense: Path, out: Path
) -> DetectorTrainingSettings:
    """Training of the compressed detector with the dense one as teacher: AdamW, half a cosine, the whole run short."""
    gpu = torch.cuda.is_available()
    steps = request.effort.finetune_steps
    folder = RunFolder(out)
    return DetectorTrainingSettings(
        task=task,
        data=data,
        init=small,
        teacher=dense,
        out=out,
        steps=steps,
        batch_size=request.batch_size,
        workers=2,
        seed=request.seed,
        optimizer="adamw",
        lr=2e-4,
        weight_decay=0.02,
        clip_norm=5.0,
        schedule="cosine",
        warmup_steps=min(100, steps // 10),
        precision="bf16" if gpu and torch.cuda.is_bf16_supported() else "no",
        cpu_forms=not gpu,
        evaluate_every=0,
        evaluation_images=8,
        state_every=50,
        log_every=max(1, min(10, steps // 30)),
        resume=folder.state.is_file(),
        overwrite=folder.settings.is_file() and not folder.state.is_file(),
    )


def finetune_command(settings: DetectorTrainingSettings) -> str:
    """`norton train_det` with all that differs from its defaults."""
    shown = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if field.default is MISSING or getattr(settings, field.name) != field.default
    }
    left_out = ("detector", "resume", "overwrite")  # a run that was stopped goes on with --resume
    options: dict[str, object] = {name: value for name, value in shown.items() if name not in left_out}
    return tool("train_det", **options)


def finetune(settings: DetectorTrainingSettings, command: str, report: Report) -> dict[str, Any]:
    """Train, going on where a run was stopped; returns the steps done."""
    result = train_detector(settings, command=command, announce=lambda line: report(f"    {line}"))
    return {"steps": result.steps}


def export_options(
    request: DeployRequest, image_size: tuple[int, int], data: Path, *, multiplied_out: bool
) -> ExportOptions:
    """What both graphs are, the dense one and the small one; 8 bits are calibrated on the training images."""
    target = EngineTarget.parse(request.target)
    return ExportOptions(
        image_size=image_size,
        precision=request.precision,
        calibration=str(data / "train2017") if request.precision == "int8" else None,
        form="dense" if multiplied_out else "grouped",
        target=target.graph or "onnxruntime",
    )


def export_file(
    model: Path, out: Path, options: ExportOptions, data: Path, parity_images: int, report: Report
) -> dict[str, Any]:
    """Export a checkpoint and compare the graph with it on val's images; returns the comparison (`ParityReport`)."""
    detector, task, categories = open_detector(str(model))
    images = [read_image(file) for file in find_images(data / "val2017")[:parity_images]]
    out.parent.mkdir(parents=True, exist_ok=True)
    made = export_checked(detector, task, categories, out, options, images, report=lambda line: report(_indented(line)))
    return {"parity": made.parity.to_dict()}


def build_engine_of(graph: Path, out: Path, target: EngineTarget, report: Report) -> dict[str, Any]:
    """Build the engine from the graph where this machine can, and compare it with the model where it can run here.

    Returns:
        JSON values: "built", "ran", and the "reason" why it was not built.
    """
    assert target.engine is not None
    build = check_engine(
        build_or_explain(graph, out, engine=target.engine, compute_capability=target.compute_capability),
        report=lambda text: report(_indented(text)),
    )
    report(_indented(build.text()))
    built = build.manifest is not None
    return {"built": built, "ran": built and cast(EngineManifest, build.manifest).ran, "reason": build.reason}


def export_command(
    model: Path, out: Path, options: ExportOptions, data: Path, parity_images: int, artefact: Path | None
) -> str:
    """`norton export_onnx` for `export_file`."""
    return tool(
        "export_onnx", model=model, out=out, image_size=options.image_size, precision=options.precision,
        calibration=options.calibration, form=options.form, target=options.target, images=data / "val2017",
        parity_images=parity_images, artefact=artefact,
    )  # fmt: skip


def plan_command(dense: Path, request: PlanRequest, engine: TimedEngine, out: Path) -> str:
    """`norton plan` for `search_plan`."""
    values = {name: value for name, value in asdict(request).items() if value not in ((), False, None)}
    return tool("plan", model=dense, out=out, engine=engine, no_check_harm=not request.check_harm, **values)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
