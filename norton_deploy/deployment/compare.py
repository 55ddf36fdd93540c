"""Any two model files on one's own data: AP of both, paired speed-up, pictures, and the same report."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.data.category_list import names_no_categories, read_categories
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.coco_index import annotation_file
from norton_deploy.deployment.making import tool
from norton_deploy.deployment.measurement import (
    DENSE,
    SMALL,
    model_record,
    read_results,
    score_file,
    speedup_of,
    time_in_turn,
)
from norton_deploy.deployment.steps import Steps, to_stderr
from norton_deploy.errors import UserError, require_least
from norton_deploy.files import sha256_of
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Backend, Predictor
from norton_deploy.reporting.compared_images import compare_images
from norton_deploy.reporting.deployment import Deployment, ModelRecord
from norton_deploy.reporting.deployment_report import write_report
from norton_deploy.reporting.detector_table import MODEL_NAMES
from norton_deploy.reporting.provenance import provenance
from norton_deploy.structures import Categories, Task


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """Which two models to compare, on what."""

    model: Path
    """Checkpoint (.safetensors), torchvision's .pth, .onnx or .engine."""
    baseline: Path
    """What it is compared with: any of these too, of the same task and categories."""
    data: Path
    """Folder in COCO-2017's layout; val2017 is used."""
    out: Path
    """Folder to make: report.html, report.md, report.json. The same line goes on where it was stopped."""
    categories: Path | None = None
    """Categories of .pth files: a COCO annotation file or a list of names; by default the data's."""
    images: int | None = None
    """Measure AP on the first so many images; by default all."""
    rounds: int = 20
    """Timed calls of each model, in turn."""
    backend: Backend | None = None
    """What runs .onnx files: onnxruntime (the default) or openvino."""

    def __post_init__(self) -> None:
        require_least(1, images=self.images, rounds=self.rounds)


def compare(request: CompareRequest, *, command: str, report: Callable[[str], None] = to_stderr) -> Deployment:
    """Measure both, and write report.html, report.md and report.json into `request.out`.

    Args:
        request: which, on what.
        command: the command line, for the report.
        report: gets every message for people.

    Raises:
        UserError: a model or the data cannot be read, or the models are of different tasks or categories.
    """
    files = {DENSE: request.baseline, SMALL: request.model}
    predictors = {name: _load(file, request) for name, file in files.items()}
    small, dense = predictors[SMALL], predictors[DENSE]
    if (small.task, small.categories) != (dense.task, dense.categories):
        raise UserError(f"{request.model} and {request.baseline}: another task or other categories; nothing to compare")
    task: Task = small.task
    identity: dict[str, Any] = {name: sha256_of(file) for name, file in files.items()}
    identity |= {name: getattr(request, name) for name in ("images", "rounds", "backend")}
    identity["annotations"] = sha256_of(annotation_file(request.data, "val", task))
    steps = Steps(request.out, identity, count=3, report=report)
    dataset = CocoDetection(request.data, "val", task, categories=small.categories)
    count = len(dataset.image_ids[: request.images])
    results = {name: request.out / "results" / f"{name}.json" for name in files}
    scores: dict[str, dict[str, Any]] = {}
    timed = time_in_turn(predictors, request.data, 1)["latency"]
    for name, file in files.items():
        pth = request.categories if names_no_categories(file) else None
        backend = request.backend if file.suffix == ".onnx" else None

        def score(
            name: str = name, file: Path = file, pth: Path | None = pth, backend: Any = backend
        ) -> dict[str, Any]:
            return score_file(
                file, request.data, task, results[name], backend=backend, limit=request.images, categories=pth
            )

        scores[name] = steps.run(
            f"ap-{name}", f"AP of {file.name}, {count} images",
            tool("eval_det", task=task, data=request.data, model=file, limit=request.images, categories=pth,
                 backend=backend),
            score, seconds=count * timed[name]["p50_ms"] / 1e3, products=[results[name]],
        )  # fmt: skip
    timing = steps.run(
        "time", "latency of both in turn",
        tool("latency", models=(request.baseline, request.model), data=request.data, rounds=request.rounds,
             backend=request.backend),
        lambda: time_in_turn(predictors, request.data, request.rounds),
        seconds=(request.rounds + 2) * sum(value["p50_ms"] for value in timed.values()) / 1e3,
    )  # fmt: skip
    compared = compare_images(
        request.out, dataset, read_results(results[DENSE]), read_results(results[SMALL]), limit=request.images
    )
    made = Deployment(
        title=f"{MODEL_NAMES[task]}: {' against '.join(names_of(request.model, request.baseline))}",
        task=task,
        dense=_record(DENSE, request, scores, timing),
        small=_record(SMALL, request, scores, timing),
        provenance=provenance() | {"command": command},
        data=request.data.resolve().name,
        images=count,
        speedup=speedup_of(timing),
        compared=compared,
        steps=steps.records,
    )
    write_report(request.out, made)
    return made


def names_of(model: Path, baseline: Path) -> tuple[str, str]:
    """What the report calls the two files: their names, with as many folders before them as make a difference."""
    paths = [path.resolve().parts for path in (model, baseline)]
    for parts in range(1, max(map(len, paths)) + 1):
        first, second = ("/".join(path[-parts:]) for path in paths)
        if first != second:
            return first, second
    return model.name, f"{model.name} (itself)"


def _load(file: Path, request: CompareRequest) -> Predictor:
    """A model file; a .pth without --categories, with as many classes as the data, detects the data's."""
    is_pth = names_no_categories(file)
    predictor = load_predictor(
        file,
        backend=request.backend if file.suffix == ".onnx" else None,
        categories=request.categories if is_pth else None,
    )
    if is_pth and request.categories is None:
        own = Categories.from_coco(read_categories(annotation_file(request.data, "val", predictor.task)))
        if own.num_classes == predictor.categories.num_classes:
            predictor.categories = own
    return predictor


def _record(
    name: str, request: CompareRequest, scores: dict[str, dict[str, Any]], timing: dict[str, Any]
) -> ModelRecord:
    file, macs, params = request.baseline if name == DENSE else request.model, None, None
    model, baseline = names_of(request.model, request.baseline)
    if file.suffix == ".safetensors" or names_no_categories(file):
        opened = open_model(str(file))
        counted = complexity_of(opened.model, opened.header.settings)
        macs, params = counted.macs, counted.params
    called = baseline if name == DENSE else model
    return model_record(called, file, request.out, scores[name], timing, name, macs=macs, params=params)
