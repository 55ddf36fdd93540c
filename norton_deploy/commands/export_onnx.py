"""norton export_onnx: a detector as one ONNX file that was compared with eager mode, stage by stage."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.checkpoints.digest import tensors_digest
from norton_deploy.checkpoints.open_model import open_model, published_categories
from norton_deploy.commands import write_json
from norton_deploy.compression.compress import build_detector
from norton_deploy.compression.lowering import Form, lower_model
from norton_deploy.config import parse_settings
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.evaluation.detector_evaluation import evaluate_detector
from norton_deploy.export.fixed_sampling import fix_sampling, is_adaptive
from norton_deploy.export.onnx_export import Precision, export_onnx
from norton_deploy.export.precision import to_fp16
from norton_deploy.export.random_weights import calibrate_random_detector
from norton_deploy.export.static_rcnn import GraphSettings, InputDtype, StaticRCNN, Target
from norton_deploy.files import check_output_file, refuse_same_file
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import read_image
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import ImageSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.parity.gate import Image, check_parity
from norton_deploy.parity.sampling_effect import measure_sampling_effect
from norton_deploy.structures import Categories, Task

RANDOM_SIZE = (800, 800)
"""Of graphs of random detectors, as in the paper's Table III."""
FAR = 2.0
"""A graph whose short side differs by more than this factor from the model's own is remarked upon."""


@dataclass(kw_only=True)
class ExportSettings:
    """What every export is told."""

    out: Path
    """The file to write."""
    model: str | None = None
    """Detector: a checkpoint (.safetensors) or torchvision's .pth; without it weights are random."""
    task: Task | None = None
    """box, mask or keypoint; needed without --model, checked with it."""
    plan: Path | None = None
    """Without --model: compress the random detector by this plan."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the image that the detector sees, the graph's input without --input-size; by
    default a square of the model's own short side (800 without --model)."""
    input_size: tuple[int, int] | None = None
    """Height and width of the camera's frames: the graph letterboxes them into --image-size itself, takes no other
    size, and gives boxes in their pixels."""
    batch: int = 1
    """Images per run."""
    precision: Precision = "fp32"
    """fp32, or fp16 (see export/precision.py for what stays fp32)."""
    max_detections: int | None = None
    """Detections per image; by default the model's own number."""
    score_threshold: float | None = None
    """Detections below this score are dropped; by default the model's own threshold."""
    candidates: int = 1024
    """(Proposal, class) pairs that are decoded per image; an output says when they were too few."""
    nms_iterations: int = 24
    """Unrolled NMS steps of the tensorrt target; an output says when they were too few."""
    input_dtype: InputDtype = "uint8"
    """uint8 [B, H, W, 3] RGB, or float32 [B, 3, H, W] RGB in 0..1."""
    resize: Literal["letterbox", "none"] = "letterbox"
    """Whether the predictor may letterbox images of another size, or refuses them (as always with --input-size)."""
    form: Form = "grouped"
    """How CPDBlocks leave: grouped, separable or dense."""
    images: tuple[Path, ...] = ()
    """Images (files, folders) to compare on; by default embedded scenes."""
    parity_images: int = 4
    """How many images to compare on, at most."""
    eval: Path | None = None
    """Also evaluate AP before and after on the val split of this folder in COCO-2017's layout."""
    eval_limit: int | None = None
    """Evaluate on the first so many images only."""
    json: Path | None = None
    """Write the report as JSON to a file, or to stdout with '-'."""


@dataclass(kw_only=True)
class Settings(ExportSettings):
    """Settings of export_onnx."""

    target: Target = "onnxruntime"
    """onnxruntime: with ONNX's NonMaxSuppression; tensorrt: standard operators of fixed shape only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Export, compare, report."""
    settings = parse_settings(Settings, argv, prog="export_onnx", description=__doc__ or "")
    report = export_checked(settings, settings.target, settings.out)
    write_json(report, settings.json)
    return 0


def export_checked(settings: ExportSettings, target: Target, out: Path) -> dict[str, Any]:
    """Write `out` if, and only if, it passes the parity check; returns the report.

    Raises:
        UserError: wrong settings, or the graph differs; it then stays beside `out` as *.unchecked.onnx.
    """
    if settings.parity_images < 1:
        raise UserError("parity_images: every export is compared on at least 1 image")
    check_output_file(out, "--out", ".onnx")
    check_output_file(settings.json, "--json")
    refuse_same_file(out, None if settings.model is None else Path(settings.model))
    original, categories, task = open_detector(settings)
    image_size = graph_size(settings, original)
    images = parity_images(settings, image_size)
    dataset = None
    if settings.eval is not None:
        dataset = CocoDetection(settings.eval, "val", task, categories=categories)
    adaptive = is_adaptive(original)
    model = fix_sampling(original) if adaptive else original
    unchecked = out.with_suffix(".unchecked.onnx")
    started = time.perf_counter()
    graph = StaticRCNN(
        lower_model(model, settings.form),
        GraphSettings(
            image_size=image_size,
            batch=settings.batch,
            target=target,
            max_detections=settings.max_detections,
            candidates=settings.candidates,
            nms_iterations=settings.nms_iterations,
            input_dtype=settings.input_dtype,
            input_size=settings.input_size,
        ),
    )
    if settings.precision == "fp16":
        to_fp16(graph)
    contract = export_onnx(
        graph,
        unchecked,
        categories=categories,
        precision=settings.precision,
        weights_sha256=tensors_digest(model.state_dict()),
        letterbox=settings.resize == "letterbox",
    )
    exported = time.perf_counter()
    parity = check_parity(model, unchecked, images)
    compared = time.perf_counter()
    print(f"{out}: {task}, {settings.precision}, {target}\n{parity.table()}", file=sys.stderr)
    if parity.detections == 0:
        print("warning: nothing was detected in any image; compare on better --images", file=sys.stderr)
    parity.require()
    os.replace(unchecked, out)
    report = {
        "file": str(out),
        "contract": contract,
        "parity": parity.to_dict() | {"graph": str(out)},
        "export_s": exported - started,
        "parity_s": compared - exported,
    }
    if adaptive:
        effect = measure_sampling_effect(original, model, images, image_size)
        print(f"note: {effect.sentence()}", file=sys.stderr)
        report["sampling_effect"] = asdict(effect)
    if dataset is not None:
        report["average_precision"] = average_precision(settings, original, dataset, task, out)
    print(
        f"{out}: equal to eager mode on {parity.images} images ({parity.detections} detections); "
        f"export {exported - started:.0f} s, comparison {compared - exported:.0f} s",
        file=sys.stderr,
    )
    return report


def open_detector(settings: ExportSettings) -> tuple[GeneralizedRCNN, Categories, Task]:
    """The detector that the user named, or a random one, in eval mode."""
    if settings.model is not None:
        if settings.plan is not None:
            raise UserError("--plan: only without --model; compress a model with the command compress")
        checkpoint = open_model(settings.model)
        task = checkpoint.header.task
        if task == "cls":
            raise UserError(f"{settings.model}: a classifier; export takes detectors")
        if settings.task not in (None, task):
            raise UserError(f"{settings.model}: a detector for task '{task}', --task is '{settings.task}'")
        model, categories = cast(GeneralizedRCNN, checkpoint.model), checkpoint.header.categories
    else:
        if settings.task is None:
            raise UserError("--task: needed without --model")
        task = settings.task
        size = settings.image_size or RANDOM_SIZE
        shape = DetectorSettings(image=ImageSettings(min_size=min(size), max_size=max(size)))
        shape = replace(shape, num_classes=2) if task == "keypoint" else shape
        plan = None if settings.plan is None else CompressionPlan.load(settings.plan)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build_detector(task, shape, plan)
        scenes = [draw_scene(seed, size).image for seed in (1000, 1001)]
        pixels = [torch.from_numpy(scene).permute(2, 0, 1).to(torch.float32) / 255 for scene in scenes]
        calibrate_random_detector(model, pixels, shape)
        categories = published_categories(task, shape.num_classes)
    if settings.score_threshold is not None:
        if not 0.0 <= settings.score_threshold < 1.0:
            raise UserError(f"score_threshold: expected 0 to 1, got {settings.score_threshold}")
        model.roi_heads.score_thresh = settings.score_threshold
    return model.eval(), categories, task


def graph_size(settings: ExportSettings, model: GeneralizedRCNN) -> tuple[int, int]:
    """--image-size, or the square of the model's own short side; a size far from it is remarked upon."""
    own = int(model.transform.min_size[-1])
    if settings.image_size is None:
        return RANDOM_SIZE if settings.model is None else (own, own)
    if not own / FAR <= min(settings.image_size) <= own * FAR:
        print(
            f"warning: --image-size {settings.image_size[0]} {settings.image_size[1]} is far from the {own} pixels of "
            "the short side that this model was made for: expect it to miss much; leave --image-size out, or see "
            "what is lost with --eval",
            file=sys.stderr,
        )
    return settings.image_size


def parity_images(settings: ExportSettings, image_size: tuple[int, int]) -> list[Image]:
    """The user's first images, or embedded scenes of the size of the graph's input."""
    if settings.images:
        files = [file for path in settings.images for file in find_images(path)]
        return [read_image(file) for file in files[: settings.parity_images]]
    return [draw_scene(seed, settings.input_size or image_size).image for seed in range(settings.parity_images)]


def average_precision(
    settings: ExportSettings, model: GeneralizedRCNN, dataset: CocoDetection, task: Task, out: Path
) -> dict[str, dict[str, float]]:
    """COCO AP, by measure, before (eager mode, its own resizing and decoding) and after (the graph)."""
    scores: dict[str, dict[str, float]] = {}
    for name, predictor in (
        ("before", TorchPredictor(model, task, dataset.categories, device="cpu")),
        ("after", OnnxRuntimePredictor(out, device="cpu")),
    ):
        metrics = evaluate_detector(predictor, dataset, limit=settings.eval_limit).metrics
        scores[name] = {measure: float(values["AP"]) for measure, values in metrics.items()}
    for measure, before in scores["before"].items():
        after = scores["after"][measure]
        print(f"{measure} AP: {before:.4f} in eager mode, {after:.4f} as {settings.precision} graph", file=sys.stderr)
    return scores
