"""The parity gate: does an exported graph compute what the model computes in eager mode, and if not, from where on?

The shipped file itself is run, by the predictor that will run it and with the predictor's own letterbox and decoding.
Its tensors between the stages are read from parts cut out of it (`GraphPart`); each stage in eager mode starts from the
graph's own input to that stage. What the images do not show, because little is found in them, is compared on tensors
that the gate makes itself (`given_heads`). Limits follow from what was asked for, never from the file.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract, Precision
from norton_deploy.export.letterbox import Letterbox, letterboxed
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.export.static_rcnn import mask_paste_of, task_of
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.predictor import Image
from norton_deploy.inference.static_graph import StaticGraphPredictor, to_graph_input
from norton_deploy.parity.comparison import Arrays
from norton_deploy.parity.eager_stages import EagerStages
from norton_deploy.parity.given_heads import compare_given, on_canvas
from norton_deploy.parity.graph_parts import CuttableGraph
from norton_deploy.parity.references import Example, compare_detections
from norton_deploy.parity.report import TOLERANCES, ParityReport, Tolerances
from norton_deploy.parity.stages import (
    BOX_OUTPUTS,
    chosen,
    compare_layers,
    compare_proposals,
    compare_selection,
    decoded,
    tied,
    to_canvas,
)
from norton_deploy.structures import Categories

RESIZE_LEVELS = 1.0
"""How far a graph's own resizing may be from the predictor's, in levels of 255."""
OWN_SCENES = 4242
"""Seed of the first scene that the gate adds to the images: on a grey one a whole layer may have no effect."""


@torch.no_grad()
def check_parity(
    model: GeneralizedRCNN,
    onnx_path: str | Path,
    images: Sequence[Image],
    *,
    precision: Precision = "fp32",
    categories: Categories | None = None,
    predictor: StaticGraphPredictor | None = None,
    tolerances: Tolerances | None = None,
    keep: list[Example] | None = None,
) -> ParityReport:
    """Compare an exported graph, run by ONNX Runtime on the CPU, with its model in eager mode.

    Args:
        model: the detector that was exported, in eval mode, on the CPU, before any lowering; not changed.
        images: uint8 RGB [H, W, 3]; any size, they are letterboxed into the graph's. The last batch is filled up from
            the first images; a batch of the gate's own goes before them, for the layers. Lists are compared where
            scores do not tie as on blank images. Where the graph resizes its input itself, its result is compared with
            the predictor's letterbox, and is what eager mode is given.
        precision: that the graph was asked for.
        categories: of the model; None leaves the graph's unchecked.
        predictor: what runs the whole graph for the last stage, by default ONNX Runtime on the CPU; an engine that was
            built from the graph is compared by giving it here, and must then find enough in the images itself.
        keep: gets the images and what eager mode finds in them.

    Raises:
        UserError: no images, a file that `export_onnx` did not write or that says other things about itself than the
            model, or a predictor of another graph.
    """
    if not images:
        raise UserError("parity: no images to compare on")
    contract = read_contract(onnx_path)
    require_same(contract, model, precision, categories, str(onnx_path))
    shipped = predictor or OnnxRuntimePredictor(Path(onnx_path), device="cpu")
    if shipped.contract != contract:
        raise UserError(f"{shipped.name}: was not made from {onnx_path}")
    limits = tolerances or TOLERANCES["fp32" if precision == "tf32" and predictor is None else precision]
    report = ParityReport(str(onnx_path), precision)
    eager = EagerStages(model, contract.image_size, contract.max_detections)
    graph = CuttableGraph(onnx_path)
    if graph.max_detections != contract.max_detections:
        raise UserError(f"{onnx_path}: its metadata say max_detections = {contract.max_detections}; export it again")
    layers = graph.part(
        [*(name for name in graph.stages if name not in ("heatmaps", "canvas_keypoints")), *BOX_OUTPUTS]
    )

    def run_layers(frames: Image) -> tuple[Image, Arrays]:
        """The canvas and the stages of a batch of frames, after their comparison."""
        stages = layers({contract.input_name: to_graph_input(frames, contract.input_dtype)})
        canvas = frames
        if contract.resize == "graph":
            expected = letterboxed(list(frames), contract.image_size)
            levels = float(np.abs(stages["canvas"] - expected).max())
            report.record("resize", "difference, levels", levels, RESIZE_LEVELS)
            canvas = stages["canvas"].astype(np.uint8)
        compare_layers(report, eager, canvas, stages, limits)
        return canvas, stages

    needed = ["boxes", *(name for name in ("masks", "keypoints") if name in graph.outputs)]
    _, stages = run_layers(letterboxed(own_scenes(contract), contract.input_size))
    if predictor is None:
        frame = Letterbox.fit(contract.input_size, contract.image_size)
        compare_given(report, graph, eager, stages, limits, frame)
        needed.append("proposals")
    filled = [*images, *islice(cycle(images), -len(images) % contract.batch)]
    for start in range(0, len(filled), contract.batch):
        frames = letterboxed(filled[start : start + contract.batch], contract.input_size)
        canvas, stages = run_layers(frames)
        judged = ~tied(stages)
        compare_proposals(report, "proposals", eager, stages, limits, judged)
        compare_selection(report, "detections", eager, stages, on_canvas(stages), limits, judged)
        outputs = shipped.run(to_graph_input(frames, contract.input_dtype))
        if contract.resize == "graph":
            outputs = to_canvas(outputs, Letterbox.fit(contract.input_size, contract.image_size))
        found = decoded(outputs, eager, contract.mask_paste)
        references = chosen(eager.references(canvas, limits), judged)
        compare_detections(report, "final", references, chosen(found, judged), limits, **eager.cuts)
        if keep is not None:
            keep += map(Example, chosen(list(frames), judged), references)
        report.images += len(canvas)
        report.detections += sum(map(len, found))
        for flag in report.inexact:
            report.inexact[flag] += int(not outputs[flag].all())
    report.require_enough(*needed)
    return report


def own_scenes(contract: GraphContract) -> list[Image]:
    """A batch of the gate's own."""
    return [draw_scene(OWN_SCENES + index, contract.input_size).image for index in range(contract.batch)]


def require_same(
    contract: GraphContract, model: GeneralizedRCNN, precision: Precision, categories: Categories | None, source: str
) -> None:
    """What a graph says about itself must be what its model says.

    Raises:
        UserError: the first entry that differs.
    """
    expected = {
        "task": task_of(model),
        "precision": precision,
        "weights_sha256": tensors_digest(model.state_dict()),
        "score_threshold": model.roi_heads.score_thresh,
        "mask_paste": mask_paste_of(model),
    }
    if categories is not None:
        expected["categories"] = categories
    for name, value in expected.items():
        found = getattr(contract, name)
        if found != value:
            raise UserError(f"{source}: its metadata say {name} = {found!r}, the model's is {value!r}; export it again")
