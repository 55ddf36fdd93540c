"""Drawing detections with supervision: boxes, labels, masks, skeletons; models side by side; files of images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import supervision as sv

from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.inference.image_journal import ImageJournal, Processes
from norton_deploy.inference.predictor import Image, Predictor
from norton_deploy.progress import progress_bar
from norton_deploy.structures import Categories, Detections

COCO_KEYPOINTS = 17
FONT = cv2.FONT_HERSHEY_SIMPLEX
BAR_HEIGHT = 24
BAR_LEVEL = 30
TEXT_COLOUR = (255, 255, 255)
TEXT_SIZE_PX = 13
MASK_OPACITY = 0.45
PALETTE = sv.ColorPalette([sv.Color(colour.b, colour.g, colour.r) for colour in sv.ColorPalette.DEFAULT.colors])
"""supervision's colours with red and blue exchanged: it draws BGR, and the images here are RGB."""


def draw_detections(image: Image, detections: Detections, categories: Categories, *, scores: bool = True) -> Image:
    """A copy of the image with all detections drawn on it.

    Args:
        image: uint8 RGB [H, W, 3], the image that the detections belong to.
        detections: what to draw; filter by score beforehand, e.g. `detections[detections.scores >= 0.5]`.

    Returns:
        uint8 RGB [H, W, 3]. Keypoints whose score is not positive are left out (torchvision's scores are
        logits); the skeleton's edges are COCO's and drawn for 17 keypoints only.
    """
    scene = np.array(image)
    _draw(scene, detections, categories, scores=scores)
    return scene


def _draw(scene: Any, detections: Detections, categories: Categories, *, scores: bool = True) -> None:
    """`draw_detections` in place; the scene may be a part of a larger picture."""
    if len(detections) == 0:
        return
    objects = replace(detections, masks=None).to_supervision(categories)
    order = {label: index for index, label in enumerate(categories.labels)}
    colours = np.array([order[int(label)] for label in detections.labels])  # COCO's ids are sparse: two might share one
    scale = max(0.4, min(scene.shape[:2]) / 1000)
    thickness = max(1, round(2 * scale))
    if detections.has_masks:
        paint_masks(scene, detections, [PALETTE.by_idx(int(colour)).as_bgr() for colour in colours])
    sv.BoxAnnotator(PALETTE, thickness=thickness).annotate(scene, objects, colours)
    if detections.keypoints is not None:
        skeletons = _key_points(detections.keypoints, objects.class_id)
        if detections.keypoints.shape[1] == COCO_KEYPOINTS:
            sv.EdgeAnnotator(sv.Color.GREEN, thickness).annotate(scene, skeletons)
        sv.VertexAnnotator(sv.Color.BLUE, thickness + 1).annotate(scene, skeletons)
    names = objects.data["class_name"]
    labels = [f"{name} {score:.2f}" if scores else name for name, score in zip(names, detections.scores, strict=True)]
    labeller = sv.LabelAnnotator(
        PALETTE,
        text_scale=0.9 * scale,
        text_thickness=thickness,
        text_padding=max(2, round(5 * scale)),
        smart_position=True,  # labels at the image's edge are moved inside
    )
    labeller.annotate(scene, objects, labels, colours)


def paint_masks(scene: Image, detections: Detections, colours: Sequence[tuple[int, int, int]]) -> None:
    """Tint each mask's pixels in place, the smallest object on top; nothing outside the boxes is looked at.

    Args:
        scene: uint8 [H, W, 3].
        detections: with masks, each within its box, or as little beyond it as pasting puts there.
        colours: [N], in the scene's channel order.
    """
    crops = [detections.mask_crop(index) for index in range(len(detections))]
    dimmed = cv2.convertScaleAbs(scene, alpha=1 - MASK_OPACITY)
    for index in sorted(range(len(crops)), key=lambda index: -np.count_nonzero(crops[index][1])):
        region, pixels = crops[index]
        if pixels.size:
            # whole numbers: four times as quick
            tint: Any = (*(round(level * MASK_OPACITY) for level in colours[index]), 0)
            cv2.add(dimmed[region], tint, scene[region], pixels.view(np.uint8))


def _key_points(keypoints: np.ndarray, class_id: np.ndarray | None) -> sv.KeyPoints:
    """[N, K, 3] -> supervision's; it takes a point at (0, 0) as missing."""
    visible = keypoints[:, :, 2:] > 0
    return sv.KeyPoints(xy=np.where(visible, keypoints[:, :, :2], 0).astype(np.float32), class_id=class_id)


def compose_panels(
    image: Image,
    detections: Sequence[Detections],
    categories: Sequence[Categories],
    headings: Sequence[str],
    fps: float | None,
    latency_ms: Sequence[float],
) -> Image:
    """The models' views of one frame side by side.

    Bars above and below hold the text, so that nothing of the frame is covered.

    Args:
        image: the frame, uint8 RGB [H, W, 3].
        fps: frames per second of the whole pipeline, None while unknown.
        latency_ms: recent capture-to-display times of the whole pipeline.

    Returns:
        uint8 RGB [H + 48, W * panels, 3], one row or column more where that would be odd (video codecs
        want even sides).
    """
    (height, width), count = image.shape[:2], len(headings)
    rows = BAR_HEIGHT + height
    canvas = np.zeros((rows + BAR_HEIGHT + height % 2, width * count + width * count % 2, 3), np.uint8)
    for panel, (found, names, heading) in enumerate(zip(detections, categories, headings, strict=True)):
        columns = slice(panel * width, (panel + 1) * width)
        _write_bar(canvas[:BAR_HEIGHT, columns], heading)
        scene = canvas[BAR_HEIGHT:rows, columns]
        scene[...] = image
        _draw(scene, found, names)
    footer = "pipeline: measuring"
    if fps is not None and latency_ms:
        p50, p95 = np.percentile(latency_ms, [50, 95])
        footer = f"pipeline: {fps:.1f} FPS, capture to display p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    _write_bar(canvas[rows : rows + BAR_HEIGHT, : width * count], footer)
    return canvas


def _write_bar(bar: Image, text: str) -> None:
    """Make uint8 RGB [24, W, 3] dark, with one line of text, smaller where it would not fit."""
    bar[...] = BAR_LEVEL
    scale = cv2.getFontScaleFromHeight(FONT, TEXT_SIZE_PX, 1)
    text_width = cv2.getTextSize(text, FONT, scale, 1)[0][0]
    scale *= min(1.0, (bar.shape[1] - 12) / text_width)
    cv2.putText(bar, text, (6, 17), FONT, scale, TEXT_COLOUR, 1, cv2.LINE_AA)


@dataclass(frozen=True)
class AnnotatedImages:
    """What became of image files.

    Attributes:
        images, detections: how many.
        mean_ms: mean time of each stage.
        bad: why the other files could not be read.
    """

    images: int
    detections: int
    mean_ms: dict[str, float]
    bad: list[UserError]


def annotate_images(
    predictor: Predictor,
    files: Sequence[Path],
    out: Path,
    *,
    draw_threshold: float = 0.5,
    journal: ImageJournal,
    processes: Processes,
) -> AnnotatedImages:
    """Detect in image files; writes out/ID_NAME.jpg with the detections drawn, and all of them as COCO's
    out/detections.json. Files that cannot be read are left out; after an interruption of a single process the JSON has
    what came before.

    Args:
        draw_threshold: detections below this score are not drawn.
        journal: of this or a stopped run over these very files.
        processes: that share the files; the first one writes the JSON, all get what became of them.

    Raises:
        UserError: no file can be read, or the folder cannot be written to.
    """
    named = dict(zip(image_ids(files), files, strict=True))
    left = [image_id for image_id in named if "bad" in journal.done.get(image_id, {"bad": ""})]
    own = left[processes.rank :: processes.count]
    records = dict(journal.done) if processes.rank == 0 else {}
    whole = False
    try:
        for image_id in progress_bar(own, desc="detecting", unit="image", show=processes.rank == 0):
            records[image_id] = _annotated(predictor, image_id, named[image_id], out, draw_threshold)
            journal.add(image_id, records[image_id])
        records = dict(processes.gather(list(records.items())))
        whole = True
    finally:
        read = {image_id: record for image_id, record in sorted(records.items()) if "bad" not in record}
        if read and processes.rank == 0 and (whole or processes.count == 1):
            _write_coco(out / "detections.json", read, named, predictor.categories)
    bad = [UserError(record["bad"]) for _, record in sorted(records.items()) if "bad" in record]
    if not read:
        raise bad[0]
    mean_ms = {
        stage: sum(record["ms"][stage] for record in read.values()) / len(read)
        for stage in next(iter(read.values()))["ms"]
    }
    return AnnotatedImages(len(read), sum(len(record["entries"]) for record in read.values()), mean_ms, bad)


def _annotated(predictor: Predictor, image_id: int, file: Path, out: Path, threshold: float) -> dict[str, Any]:
    """Detect and draw: the image's size, results entries and times, or why it cannot be read; JSON values."""
    try:
        [(image, detections)] = predictor.predict_files([file])
    except UserError as error:
        return {"bad": str(error)}
    drawn = detections[detections.scores >= threshold]
    write_image(out / f"{image_id:06d}_{file.stem}.jpg", draw_detections(image, drawn, predictor.categories))
    entries = detections.to_coco_results(image_id, predictor.categories)
    return {"size": list(detections.image_size), "entries": entries, "ms": vars(predictor.timing).copy()}


def _write_coco(path: Path, read: dict[int, Any], named: dict[int, Path], names: Categories) -> None:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, record in read.items():
        height, width = record["size"]
        images.append({"id": image_id, "file_name": str(named[image_id]), "height": height, "width": width})
        for entry in record["entries"]:
            _, _, box_width, box_height = entry["bbox"]
            annotations.append({"id": len(annotations) + 1, "area": box_width * box_height, "iscrowd": 0, **entry})
    kinds = [{"id": number, "name": name} for number, name in zip(names.ids, names.names, strict=True)]
    with atomic_write(path, "w") as stream:
        json.dump({"images": images, "annotations": annotations, "categories": kinds}, stream, indent=2)


def image_ids(files: Sequence[Path]) -> list[int]:
    """COCO's own ids where all files are named by distinct numbers (000000000139.jpg), else 1, 2, 3, ..."""
    stems = [file.stem for file in files]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(files):
        return [int(stem) for stem in stems]
    return list(range(1, len(files) + 1))


def write_image(path: Path, image: Image, quality: int = 95) -> None:
    """Write uint8 RGB [H, W, 3] as JPEG of a quality of 0..100, whole or not at all."""
    encoded = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    with atomic_write(path) as stream:
        stream.write(encoded.tobytes())
