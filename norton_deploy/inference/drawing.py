"""Drawing detections with supervision: boxes, labels, masks, skeletons."""

from __future__ import annotations

import numpy as np
import supervision as sv

from norton_deploy.inference.predictor import Image
from norton_deploy.structures import Categories, Detections

COCO_KEYPOINTS = 17


def draw_detections(image: Image, detections: Detections, categories: Categories) -> Image:
    """A copy of the image with all detections drawn on it.

    Args:
        image: uint8 RGB [H, W, 3], the image that the detections belong to.
        detections: what to draw; filter by score beforehand, e.g. `detections[detections.scores >= 0.5]`.
        categories: names for the labels.

    Returns:
        uint8 RGB [H, W, 3]. Keypoints whose score is not positive are left out (torchvision's scores are
        logits); the skeleton's edges are COCO's and drawn for 17 keypoints only.
    """
    # supervision draws in OpenCV's channel order.
    scene = np.ascontiguousarray(image[:, :, ::-1])
    if len(detections) == 0:
        return np.ascontiguousarray(scene[:, :, ::-1])
    objects = detections.to_supervision(categories)
    order = {label: index for index, label in enumerate(categories.labels)}
    colours = np.array([order[int(label)] for label in detections.labels])  # COCO's ids are sparse: two might share one
    scale = max(0.4, min(image.shape[:2]) / 1000)
    thickness = max(1, round(2 * scale))
    if objects.mask is not None:
        scene = sv.MaskAnnotator(opacity=0.45).annotate(scene, objects, colours)
    scene = sv.BoxAnnotator(thickness=thickness).annotate(scene, objects, colours)
    if detections.keypoints is not None:
        skeletons = _key_points(detections.keypoints, objects.class_id)
        if detections.keypoints.shape[1] == COCO_KEYPOINTS:
            scene = sv.EdgeAnnotator(sv.Color.GREEN, thickness).annotate(scene, skeletons)
        scene = sv.VertexAnnotator(sv.Color.RED, thickness + 1).annotate(scene, skeletons)
    names = objects.data["class_name"]
    labels = [f"{name} {score:.2f}" for name, score in zip(names, detections.scores, strict=True)]
    labeller = sv.LabelAnnotator(
        text_scale=0.9 * scale,
        text_thickness=thickness,
        text_padding=max(2, round(5 * scale)),
        smart_position=True,  # labels at the image's edge are moved inside
    )
    scene = labeller.annotate(scene, objects, labels, colours)
    return np.ascontiguousarray(scene[:, :, ::-1])


def _key_points(keypoints: np.ndarray, class_id: np.ndarray | None) -> sv.KeyPoints:
    """[N, K, 3] -> supervision's; it takes a point at (0, 0) as missing."""
    visible = keypoints[:, :, 2:] > 0
    return sv.KeyPoints(xy=np.where(visible, keypoints[:, :, :2], 0).astype(np.float32), class_id=class_id)
