"""The heads on proposals and logits that the gate makes itself, so that nothing hinges on what an image holds.

On a blank image nothing is detected, and a graph that moves every box would pass. Here the shipped graph's own nodes,
cut behind the box head, get tensors that put detections where each decision shows: overlaps on both sides of the NMS
threshold, scores on both sides of the score threshold, boxes across the image's edge, every label, deltas of any size.
"""

from functools import partial

import numpy as np
import numpy.typing as npt
from torchvision.models.detection.roi_heads import RoIHeads

from norton_deploy.export.letterbox import Letterbox
from norton_deploy.parity.comparison import Arrays
from norton_deploy.parity.eager_stages import EagerStages
from norton_deploy.parity.graph_parts import CuttableGraph
from norton_deploy.parity.report import ENOUGH, TOLERANCES, ParityReport, Tolerances
from norton_deploy.parity.stages import BOX_OUTPUTS, compare_proposals, compare_selection, compare_task, to_canvas

Values = npt.NDArray[np.float32]
ROUNDS = 4
MOST_ROUNDS = 24
GIVEN = "given "
SELECTED = ("proposals", "proposal_valid", "class_logits", "box_deltas")
EXACT = TOLERANCES["fp32"]
NEVER = -200.0
"""A logit whose probability is 0 in float32."""
BACKGROUND_DELTA = 0.5
OVERLAPS = (1.0, 0.7, 0.5, 0.3, 0.1, 0.02)
"""Sides of boxes relative to their anchors', tried until the graph's NMS has enough steps."""
OVERLAP_SPREAD = 0.2
"""Overlaps lie within this of the NMS threshold ..."""
CLEAR = 2e-3
"""... but not within this, where rounding decides."""


def compare_given(
    report: ParityReport,
    graph: CuttableGraph,
    eager: EagerStages,
    maps: Arrays,
    limits: Tolerances,
    frame: Letterbox,
) -> None:
    """Compare selection and heads on given tensors, until enough of each output was compared.

    Selection and the decoding of keypoints compute in fp32 from fp32 tensors in every precision and are held to that.

    Args:
        maps: the stages of one run of the graph; of images, not of blank ones.
        limits: of masks and heatmaps.
        frame: how the graph's input lies on the canvas.
    """
    _compare_proposals(report, graph, eager, maps)
    canvas = [name for name in graph.stages if name == "canvas_boxes"]
    outputs = [*BOX_OUTPUTS, "candidates_complete", *canvas]
    select = graph.part(outputs, SELECTED)
    shape = (*maps["proposals"].shape[:2], maps["class_logits"].shape[1])
    make = partial(given_tensors, eager.model.roi_heads, eager.image_size, shape)
    most = int(eager.model.roi_heads.detections_per_img)
    for seed in range(ROUNDS):
        tensors = make(seed, most)
        found = select(tensors)
        while not found["candidates_complete"].all() and most > 1:  # the graph ranks fewer than it may return
            most //= 2
            tensors = make(seed, most)
            found = select(tensors)
        every = np.ones(shape[0], bool)
        compare_selection(report, f"{GIVEN}detections", eager, tensors, on_canvas(found), EXACT, every)
        compare_frame(report, found, frame)
    task = [name for name in ("masks", "keypoints") if name in graph.outputs]
    if not task:
        return
    extra = [name for name in graph.stages if name == "heatmaps" or name.startswith("canvas_")]
    run = graph.part([*outputs, *task, *(name for name in extra if name not in outputs)], [*SELECTED, *pyramid(maps)])
    for seed in range(MOST_ROUNDS):
        tensors = maps | make(seed, most)
        found = run(tensors)
        compare_frame(report, found, frame)
        compare_task(report, eager, tensors | found, on_canvas(found), limits, prefix=GIVEN, decoding=EXACT)
        if report.compared[task[0]] >= ENOUGH:
            return


def _compare_proposals(report: ParityReport, graph: CuttableGraph, eager: EagerStages, maps: Arrays) -> None:
    """The RPN's selection, with as much overlap as the graph's NMS has steps for."""
    part = graph.part(
        ["proposals", "proposal_valid", "nms_converged"],
        ["class_logits", "box_deltas", *(name for name in maps if name.startswith("rpn_"))],
    )
    background = np.full_like(maps["class_logits"], NEVER)
    background[:, 0] = 0
    for overlap in OVERLAPS:
        given = maps | given_scores(maps, overlap) | {"class_logits": background}
        found = part(given)
        if found["nms_converged"].all():
            every = np.ones(len(found["proposals"]), bool)
            compare_proposals(report, f"{GIVEN}proposals", eager, given | found, EXACT, every)
            return


def compare_frame(report: ParityReport, outputs: Arrays, frame: Letterbox) -> None:
    """What a resizing graph returned in the frame's pixels against the same in the canvas's."""
    back = to_canvas(outputs, frame)
    for name in ("boxes", "keypoints"):
        if f"canvas_{name}" in outputs:
            gap = float(np.abs(back[name] - outputs[f"canvas_{name}"]).max())
            report.record(f"{GIVEN}frame", f"{name}, px", gap, EXACT.box_px)


def pyramid(maps: Arrays) -> list[str]:
    """The names of the pyramid's maps."""
    return [name for name in maps if name.startswith("fpn.")]


def on_canvas(outputs: Arrays) -> Arrays:
    """A resizing graph's boxes and keypoints before they became the frame's."""
    return outputs | {name.removeprefix("canvas_"): value for name, value in outputs.items() if "canvas_" in name}


def given_scores(maps: Arrays, overlap: float) -> Arrays:
    """RPN logits and deltas by chance; boxes have `overlap` times their anchors' sides.

    In chance's order few boxes wait for one another, so that NMS needs few steps.
    """
    generator = np.random.default_rng(21)
    given: Arrays = {}
    for name, values in maps.items():
        if name.startswith("rpn_"):
            given[name] = generator.normal(0, 1 if "logits" in name else 0.1, values.shape).astype(values.dtype)
        if name.startswith("rpn_deltas."):  # channels: anchor, then x, y, width, height
            given[name].reshape(len(values), -1, 4, *values.shape[2:])[:, :, 2:] += np.log(overlap)
    return given


def given_tensors(
    heads: RoIHeads, image_size: tuple[int, int], shape: tuple[int, int, int], seed: int, most: int
) -> Arrays:
    """Inputs of the selection, different in every round and image.

    Args:
        heads: supply thresholds and the box coding.
        image_size: (height, width) in pixels.
        shape: images, proposals per image, classes with the background.
        seed: even numbers test overlaps, odd ones the score threshold.
        most: detections per image, at most.

    Returns:
        As the graph's stages: proposals float32 [B, P, 4], proposal_valid bool [B, P], class_logits float32
        [B * P, C], box_deltas float32 [B * P, C * 4].
    """
    images, rows, classes = shape
    proposals, valid = np.zeros((images, rows, 4), np.float32), np.zeros((images, rows), bool)
    logits = np.full((images, rows, classes), NEVER, np.float32)
    logits[..., 0] = 0
    generator = np.random.default_rng((seed, 21))
    deltas = generator.normal(0, BACKGROUND_DELTA, (images, rows, classes, 4)).astype(np.float32)
    for image in range(images):
        scene = overlapping if seed % 2 == 0 else graded
        boxes, scores, labels = scene(heads, image_size, min(most, rows), classes, generator)
        count = len(boxes)
        index = np.arange(count)
        deltas[image, 0, labels[0], 2] = 1e3  # the coder limits how much a box may grow
        logits[image, index, labels] = np.log(scores / (1 - scores))
        proposals[image, :count] = encoded_from(heads, boxes, deltas[image, index, labels])
        valid[image, :count] = True
    return {
        "proposals": proposals,
        "proposal_valid": valid,
        "class_logits": logits.reshape(-1, classes),
        "box_deltas": deltas.reshape(-1, classes * 4),
    }


Scene = tuple[Values, npt.NDArray[np.float64], npt.NDArray[np.int64]]


def overlapping(
    heads: RoIHeads, image_size: tuple[int, int], most: int, classes: int, generator: np.random.Generator
) -> Scene:
    """Groups of boxes: one, one of its label and lower score beside it, and, if there are labels, one of another."""
    members = min(2 + (classes > 2), most)
    groups = max(most // members, 1)
    corners, cell = grid(image_size, groups)
    size = cell * np.float32(0.6)
    step = 2 * OVERLAP_SPREAD / groups
    overlap = heads.nms_thresh - OVERLAP_SPREAD + (np.arange(groups) + generator.random(groups)) * step
    near = np.abs(overlap - heads.nms_thresh) < CLEAR
    overlap = np.where(near, heads.nms_thresh + CLEAR, overlap).clip(0.05, 0.95)
    first = np.concatenate([corners, corners + size], axis=1)
    shift = size[0] * (1 - overlap) / (1 + overlap)
    shifted = first + np.stack([shift, 0 * shift, shift, 0 * shift], axis=1)
    above = generator.permutation(np.linspace(0.3, 0.9, groups))[:, None] * (1 - 0.02 * np.arange(members))
    scores = heads.score_thresh + above * (1 - heads.score_thresh)
    labels = generator.permutation(np.arange(groups) % (classes - 1))
    boxes = np.stack([first, shifted, first], axis=1)[:, :members]
    other = (labels + 1) % (classes - 1)
    by_member = np.stack([labels, labels, other], axis=1)[:, :members] + 1
    return boxes.reshape(-1, 4).astype(np.float32), scores.reshape(-1), by_member.reshape(-1)


def graded(
    heads: RoIHeads, image_size: tuple[int, int], most: int, classes: int, generator: np.random.Generator
) -> Scene:
    """Boxes apart from one another, some across the image's edge, with scores on both sides of the threshold."""
    corners, cell = grid(image_size, most)
    boxes = np.concatenate([corners, corners + cell * np.float32(0.8)], axis=1)
    edge = np.array([image_size[1], image_size[0]], np.float32)
    boxes[:, 2:] += np.where(corners + cell * 1.5 > edge, cell, 0)
    spread = min(max(heads.score_thresh / 2, 0.02), 0.9 * (1 - heads.score_thresh))
    scores = heads.score_thresh + spread * (2 * (np.arange(most) + generator.random(most)) / most - 1)
    near = np.abs(scores - heads.score_thresh) < 5 * EXACT.score
    scores = np.where(near, scores + 10 * EXACT.score, scores).clip(1e-3, 1 - 1e-6)
    labels = generator.permutation(np.arange(most) % (classes - 1)) + 1
    return boxes, generator.permutation(scores), labels


def grid(image_size: tuple[int, int], count: int) -> tuple[Values, Values]:
    """Top left corners [count, 2] of the cells of a square grid over the image, and (width, height) of a cell."""
    side = int(np.ceil(np.sqrt(count)))
    cell = np.array([image_size[1] / side, image_size[0] / side], np.float32)
    y, x = np.divmod(np.arange(count), side)
    return (np.stack([x, y], axis=1) * cell).astype(np.float32), cell


def encoded_from(heads: RoIHeads, boxes: Values, deltas: Values) -> Values:
    """The proposals [N, 4] that `deltas` [N, 4] turn into `boxes` [N, 4]."""
    weights = np.array(heads.box_coder.weights, np.float32)
    shift, growth = np.split(deltas / weights, 2, axis=1)
    size = (boxes[:, 2:] - boxes[:, :2]) / np.exp(np.minimum(growth, heads.box_coder.bbox_xform_clip))
    centre = (boxes[:, 2:] + boxes[:, :2]) / 2 - shift * size
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)
