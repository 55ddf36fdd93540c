"""COCO's AP and AR of boxes, masks and keypoints, computed by pycocotools."""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from norton_deploy.errors import UserError
from norton_deploy.structures import Task

IouType = Literal["bbox", "segm", "keypoints"]
Metrics = dict[str, float]

# What each task is scored on. The last entry is the task's own measure: the paper's Table III lists AP and
# AR of the boxes for Faster R-CNN, of the masks for Mask R-CNN, of the keypoints (OKS) for Keypoint R-CNN.
IOU_TYPES: dict[Task, tuple[IouType, ...]] = {
    "box": ("bbox",),
    "mask": ("bbox", "segm"),
    "keypoint": ("bbox", "keypoints"),
}
RESULT_FIELD: dict[IouType, str] = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}

# Names of `COCOeval.stats`, in its order.
OVERLAP_METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl"]
KEYPOINT_METRICS = ["AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl"]

CURVE_IOUS = (0.5, 0.75)
"""Overlaps (of keypoints: OKS) whose precision-recall curves are kept."""


@dataclass(frozen=True)
class CategoryScore:
    """How one category is detected, over objects of all sizes.

    Attributes:
        id, name: COCO's.
        objects: annotated ones, without crowds.
        ap: AP@[.50:.95], 0..1; None without an object.
    """

    id: int
    name: str
    objects: int
    ap: float | None


@dataclass(frozen=True)
class MeasureScore:
    """One measure in full.

    Attributes:
        metrics: name -> value, see `score_coco`.
        categories: each category's, in the order of their ids.
        precision: IoU ("0.50", "0.75") -> precision at recall 0, 0.01, ..., 1, the mean of the categories with objects.
    """

    metrics: Metrics
    categories: tuple[CategoryScore, ...]
    precision: dict[str, tuple[float, ...]]


def primary_iou_type(task: Task) -> IouType:
    """The measure that Table III lists for this task: "bbox", "segm" or "keypoints"."""
    return IOU_TYPES[task][-1]


def table3_scores(task: Task, metrics: Mapping[str, Metrics]) -> tuple[float, float]:
    """(AP, AR) as Table III of the paper lists them.

    AP is AP@[.50:.95] and AR is AR@[.50:.95] with 100 detections an image for boxes and masks, the OKS AP
    and AR (20 detections an image) for keypoints.
    """
    iou_type = primary_iou_type(task)
    return metrics[iou_type]["AP"], metrics[iou_type]["AR" if iou_type == "keypoints" else "AR100"]


def results_of_type(results: Iterable[Mapping[str, Any]], iou_type: IouType) -> list[dict[str, Any]]:
    """The entries of one measure, in the format of COCO's evaluation server.

    Each keeps image_id, category_id, score and the one field that is measured. Boxes must not accompany
    masks or keypoints: pycocotools would then sort the detections into small, medium and large by the
    area of the box.

    Raises:
        UserError: an entry lacks the field.
    """
    field = RESULT_FIELD[iou_type]
    kept = ("image_id", "category_id", "score", field)
    try:
        return [{key: entry[key] for key in kept} for entry in results]
    except KeyError as error:
        raise UserError(f"COCO results: an entry has no {error} field; '{iou_type}' needs {', '.join(kept)}") from error


def score_coco(
    coco_gt: COCO,
    results: Mapping[IouType, Sequence[Mapping[str, Any]]],
    image_ids: Sequence[int] | None = None,
) -> dict[IouType, MeasureScore]:
    """Score detections against COCO ground truth.

    Args:
        results: for each measure ("bbox", "segm", "keypoints") its COCO results entries; the entries are
            left as they are. An empty list scores 0.
        image_ids: the images to score, all of `coco_gt` when None. Images without detections count.

    Returns:
        each measure's metrics (`OVERLAP_METRICS` or `KEYPOINT_METRICS`, 0..1; as in pycocotools -1 stands where the
        ground truth has no object of that size), every category and the precision-recall curves.

    Raises:
        UserError: a result names an image or category that is not in the ground truth, or lacks a field.
    """
    scored_images = sorted(set(coco_gt.getImgIds() if image_ids is None else image_ids))
    if unknown := sorted(set(scored_images) - set(coco_gt.getImgIds())):
        raise UserError(f"evaluation: image id {unknown[0]} is not in the ground truth")
    scores: dict[IouType, MeasureScore] = {}
    for iou_type, entries in results.items():
        own = results_of_type(entries, iou_type)
        _check_ids(coco_gt, own)
        # pycocotools reports on stdout what it does; the caller prints a table instead
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = COCOeval(coco_gt, _load_results(coco_gt, own), iou_type)
            evaluation.params.imgIds = scored_images
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        names = KEYPOINT_METRICS if iou_type == "keypoints" else OVERLAP_METRICS
        metrics = dict(zip(names, (float(value) for value in evaluation.stats), strict=True))
        scores[iou_type] = MeasureScore(metrics, *_curves(coco_gt, evaluation))
    return scores


def _curves(coco_gt: COCO, evaluation: COCOeval) -> tuple[tuple[CategoryScore, ...], dict[str, tuple[float, ...]]]:
    """Categories and mean curves of an accumulated evaluation: all sizes, the most detections an image."""
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, category], -1: the category has no object
    at = {iou: int(np.argmin(np.abs(evaluation.params.iouThrs - iou))) for iou in CURVE_IOUS}
    shown = set(evaluation.params.imgIds)
    categories = []
    for index, category_id in enumerate(evaluation.params.catIds):
        own = precision[:, :, index]
        objects = [coco_gt.anns[number] for number in coco_gt.getAnnIds(catIds=[category_id], iscrowd=False)]
        known = bool((own > -1).all())
        categories.append(
            CategoryScore(
                int(category_id),
                str(coco_gt.cats[category_id]["name"]),
                sum(entry["image_id"] in shown for entry in objects),
                float(own.mean()) if known else None,
            )
        )
    present = precision[:, :, (precision > -1).all(axis=(0, 1))]
    means = {f"{iou:.2f}": present[row].mean(axis=1) if present.size else [] for iou, row in at.items()}
    return tuple(categories), {iou: tuple(np.round(curve, 4).tolist()) for iou, curve in means.items()}


def _check_ids(coco_gt: COCO, entries: Sequence[Mapping[str, Any]]) -> None:
    for field, known in (("image_id", set(coco_gt.getImgIds())), ("category_id", set(coco_gt.getCatIds()))):
        if unknown := sorted({entry[field] for entry in entries} - known):
            raise UserError(
                f"COCO results: {field} {unknown[0]} is not in the ground truth ({len(unknown)} unknown in "
                "all); evaluate on the annotation file that the images came from"
            )


def _load_results(coco_gt: COCO, entries: list[dict[str, Any]]) -> COCO:
    if entries:
        return coco_gt.loadRes(entries)
    empty = COCO()
    empty.dataset = {
        "images": coco_gt.dataset["images"],
        "categories": coco_gt.dataset["categories"],
        "annotations": [],
    }
    empty.createIndex()
    return empty


def metrics_table(task: Task, metrics: Mapping[str, Metrics]) -> str:
    """A Markdown table of all metrics that says which of them Table III of the paper lists."""
    primary = primary_iou_type(task)
    marks = {"AP": "AP in Table III", "AR" if primary == "keypoints" else "AR100": "AR in Table III"}
    lines = ["| measure | metric | value | |", "|---|---|---:|---|"]
    for iou_type, values in metrics.items():
        for name, value in values.items():
            shown = "no objects" if value < 0 else f"{value:.4f}"
            mark = marks.get(name, "") if iou_type == primary else ""
            lines.append(f"| {iou_type} | {name} | {shown} | {mark} |")
    return "\n".join(lines)
