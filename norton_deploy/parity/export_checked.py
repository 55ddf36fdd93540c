"""Export that hands nothing over unless it detects what the model detects."""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.checkpoints.open_model import open_model, published_categories
from norton_deploy.compression.calibration import random_detector
from norton_deploy.compression.lowering import Form, lower_model
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_detector
from norton_deploy.export.contract import GraphContract, Precision
from norton_deploy.export.onnx_export import export_onnx
from norton_deploy.export.precision import to_fp16
from norton_deploy.export.quantise import Cpu
from norton_deploy.export.static_rcnn import GraphOptions, GraphSettings, StaticRCNN
from norton_deploy.export.static_roi_align import fix_sampling, is_adaptive
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.parity.checked_quantisation import Quantisation, calibration_images
from norton_deploy.parity.gate import check_parity
from norton_deploy.parity.references import Example
from norton_deploy.parity.report import ParityReport
from norton_deploy.parity.sampling_effect import SamplingEffect, measure_sampling_effect
from norton_deploy.parity.verification import ReferenceFile, reference_path
from norton_deploy.structures import Categories, Task

RANDOM_SIZE = (800, 800)
"""Of random detectors, as in the paper's Table III."""
MOST_DRAWN = 10
"""So many times as many scenes as are asked for are drawn at most; on a tiny one nothing may be visible."""
FAR = 2.0
"""A graph whose short side differs by more than this factor from the model's own is remarked upon."""
SCENES = 4
INT8_AP_LOSS = 0.005
"""AP of any measure that 8 bits may cost."""


@dataclass(frozen=True, kw_only=True)
class ExportOptions(GraphOptions):
    """How the graph is made."""

    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the image that the detector sees, the graph's input without --input-size; by
    default a square of the model's own short side (800 without --model)."""
    precision: Precision = "fp32"
    """fp32; fp16 (see export/precision.py for what stays fp32); int8 (export/quantise.py), with --calibration; or, for
    engines, tf32: fp32 whose products the GPU may round to 10 bits of mantissa."""
    calibration: str | None = None
    """For int8: folder of images like those that will be seen, 200 to 500 of them, or 'synthetic' for drawn scenes."""
    calibration_images: int = 300
    """For int8: how many images to calibrate on, at most."""
    cpu: Cpu | None = None
    """For int8: what the CPU that will run it multiplies 8 bits with; by default that of this machine."""
    float_layers: tuple[str, ...] = ()
    """For int8: layers that stay in float."""
    head_error: float | None = None
    """For int8: leave the worst layers in float until the heads' outputs are this close to fp32's (relative error)."""
    letterbox: bool = True
    """Whether the predictor may letterbox images of another size, or refuses them (as always with --input-size)."""
    form: Form = "grouped"
    """How CPDBlocks leave: grouped, separable or dense."""


@dataclass(frozen=True)
class Export:
    """A graph that was checked.

    Attributes:
        contract: what stands in it.
        sampling_effect: what fixing adaptive RoIAlign changed; None where nothing was adaptive.
        average_precision: "before" (eager mode), "after" (the graph), of int8 also "fp32" (the graph before) ->
            measure -> COCO AP; None without a dataset.
        export_s, parity_s: seconds that export and comparison took.
    """

    file: Path
    contract: GraphContract
    parity: ParityReport
    sampling_effect: SamplingEffect | None
    average_precision: dict[str, dict[str, float]] | None
    export_s: float
    parity_s: float

    def to_dict(self) -> dict[str, Any]:
        """JSON form; what was not measured is left out."""
        report: dict[str, Any] = {
            "file": str(self.file),
            "contract": self.contract.to_json(),
            "parity": self.parity.to_dict(),
            "export_s": self.export_s,
            "parity_s": self.parity_s,
        }
        if self.sampling_effect is not None:
            report["sampling_effect"] = self.sampling_effect.to_dict()
        if self.average_precision is not None:
            report["average_precision"] = self.average_precision
        return report


def export_checked(
    model: GeneralizedRCNN,
    task: Task,
    categories: Categories,
    out: Path,
    options: ExportOptions,
    images: Sequence[Image] = (),
    *,
    scenes: int = SCENES,
    dataset: CocoDetection | None = None,
    eval_limit: int | None = None,
    report: Callable[[str], None] = print,
) -> Export:
    """Write `out`, and reference detections beside it, if, and only if, it passes the parity check.

    Args:
        model: a detector in eval mode, on the CPU; not changed.
        images: uint8 RGB [H, W, 3] to compare on.
        scenes: without `images`, how many embedded scenes to compare on.
        dataset: also evaluate AP before and after on it ...
        eval_limit: ... on its first so many images.

    Raises:
        UserError: impossible options, or the graph differs, or in int8 loses too much AP; it then stays
            beside `out` as *.unchecked.onnx.
    """
    if options.precision == "tf32" and options.target != "tensorrt":
        raise UserError("--precision tf32: a choice of TensorRT's builder; for this target it is fp32 or fp16")
    image_size = graph_size(model, options.image_size, report)
    compared_on = images or drawn_scenes(task, scenes, options.input_size or image_size)
    adaptive = is_adaptive(model)
    fixed = fix_sampling(model) if adaptive else model
    unchecked = out.with_suffix(".unchecked.onnx")
    started = time.perf_counter()
    graph = static_detector(fixed, options, image_size)
    inputs = calibration_images(options, image_size) if options.precision == "int8" else []
    contract = export_onnx(
        graph,
        unchecked,
        categories=categories,
        precision="fp32" if options.precision == "int8" else options.precision,
        weights_sha256=tensors_digest(fixed.state_dict()),
        letterbox=options.letterbox,
    )
    quantisation, scores = None, dict[str, dict[str, float]]()
    if options.precision == "int8":
        quantisation = Quantisation.of(unchecked, contract, inputs, options, report)
        if dataset is not None:
            scores["fp32"] = average_precision(OnnxRuntimePredictor(unchecked, device="cpu"), dataset, eval_limit)
        contract = quantisation.write(unchecked)
    exported = time.perf_counter()
    examples: list[Example] = []
    parity = check_parity(
        fixed, unchecked, compared_on, precision=options.precision, categories=categories, keep=examples
    )
    compared = time.perf_counter()
    report(f"{out}: {task}, {options.precision}, {options.target}\n{parity.table()}")
    try:
        parity.require()
    except UserError as error:
        raise error if quantisation is None else quantisation.advice(str(error)) from error
    effect = measure_sampling_effect(model, fixed, compared_on, image_size) if adaptive else None
    if effect is not None:
        report(f"note: {effect.sentence()}")
    if dataset is not None:
        eager = TorchPredictor(model, task, dataset.categories, device="cpu")
        scores["before"] = average_precision(eager, dataset, eval_limit)
        scores["after"] = average_precision(OnnxRuntimePredictor(unchecked, device="cpu"), dataset, eval_limit)
    for measure, before in scores.get("before", {}).items():
        after = scores["after"][measure]
        report(f"{measure} AP: {before:.4f} in eager mode, {after:.4f} as {options.precision} graph")
        # from the graph in fp32, not from eager mode: what fixed shapes change has nothing to do with 8 bits
        if quantisation is not None and scores["fp32"][measure] - after > INT8_AP_LOSS:
            raise quantisation.advice(
                f"{out}: {after:.4f} {measure} AP in int8, {scores['fp32'][measure]:.4f} as a graph of fp32; "
                f"at most {INT8_AP_LOSS} may go"
            )
    os.replace(unchecked, out)
    ReferenceFile.of(contract, options.precision, fixed, examples).save(reference_path(out))
    parity.graph = str(out)
    result = Export(out, contract, parity, effect, scores or None, exported - started, compared - exported)
    report(
        f"{out}: equal to eager mode on {parity.images} images ({parity.detections} detections); "
        f"export {result.export_s:.0f} s, comparison {result.parity_s:.0f} s"
    )
    return result


def drawn_scenes(task: Task, count: int, size: tuple[int, int]) -> list[Image]:
    """Scenes of (height, width), rather those in which there is something for the task: for keypoints, people."""
    needed, found, others = "num_keypoints" if task == "keypoint" else "area", list[Image](), list[Image]()
    for seed in range(MOST_DRAWN * count):
        scene = draw_scene(seed, size)
        kept = found if any(entry.get(needed) for entry in scene.annotations) else others
        kept.append(scene.image)
        if len(found) == count:
            break
    return (found + others)[:count]


def static_detector(model: GeneralizedRCNN, options: ExportOptions, image_size: tuple[int, int]) -> StaticRCNN:
    """The module that an export writes down; `model` is not changed."""
    shared = {field.name: getattr(options, field.name) for field in fields(GraphOptions)}
    graph = StaticRCNN(lower_model(model, options.form), GraphSettings(image_size, **shared))
    return to_fp16(graph) if options.precision == "fp16" else graph


def open_detector(
    model: str | None,
    task: Task | None = None,
    *,
    plan: Path | None = None,
    image_size: tuple[int, int] | None = None,
    score_threshold: float | None = None,
    categories: Path | None = None,
) -> tuple[GeneralizedRCNN, Task, Categories]:
    """The detector that the user named, or a random calibrated one, in eval mode.

    Args:
        model: a checkpoint or torchvision's .pth; None: random weights.
        task: needed without `model`, compared with it otherwise.
        plan: compresses the random detector.
        image_size: (height, width) that the random detector is made for, 800 x 800 by default.
        score_threshold: replaces the model's own.
        categories: of a .pth file, which names none: see `open_model`.

    Raises:
        UserError: no detector, another task, or options that contradict one another.
    """
    if score_threshold is not None and not 0.0 <= score_threshold < 1.0:
        raise UserError(f"score_threshold: expected 0 to 1, got {score_threshold}")
    if model is None:
        if task is None:
            raise UserError("--task: needed without --model")
        fitted = None if plan is None else CompressionPlan.load(plan)
        detector: GeneralizedRCNN = random_detector(task, image_size or RANDOM_SIZE, fitted)
        labels = published_categories(task, 2 if task == "keypoint" else 91)
    else:
        if plan is not None:
            raise UserError("--plan: only without --model; compress a model with the command compress")
        checkpoint = open_model(model, categories=categories)
        found = checkpoint.header.task
        if found == "cls":
            raise UserError(f"{model}: a classifier; export takes detectors")
        if task not in (None, found):
            raise UserError(f"{model}: a detector for task '{found}', --task is '{task}'")
        detector, task, labels = cast(GeneralizedRCNN, checkpoint.model), found, checkpoint.header.categories
    if score_threshold is not None:
        detector.roi_heads.score_thresh = score_threshold
    return detector.eval(), task, labels


def graph_size(
    model: GeneralizedRCNN, image_size: tuple[int, int] | None, report: Callable[[str], None]
) -> tuple[int, int]:
    """The size asked for, or the square of the model's own short side; a size far from it is remarked upon."""
    own = int(model.transform.min_size[-1])
    if image_size is None:
        return own, own
    if not own / FAR <= min(image_size) <= own * FAR:
        report(
            f"warning: --image-size {image_size[0]} {image_size[1]} is far from the {own} pixels of the short side "
            "that this model was made for: expect it to miss much; leave --image-size out, or see what is lost with "
            "--eval"
        )
    return image_size


def average_precision(predictor: Predictor, dataset: CocoDetection, limit: int | None) -> dict[str, float]:
    """COCO AP by measure."""
    metrics = evaluate_detector(predictor, dataset, limit=limit).metrics
    return {measure: float(values["AP"]) for measure, values in metrics.items()}
