"""Synthetic scenes with exact ground truth: what is where, drawn at any moment of time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.data.coco_annotation import annotation_of_mask
from norton_deploy.data.synthetic.canvas import SUPERSAMPLING, Canvas, Layer, Points, background, object_shading
from norton_deploy.data.synthetic.people import REACH, draw_person
from norton_deploy.data.synthetic.shapes import SHAPES, draw_distractor

PERSON = 1
SMALLEST_VISIBLE_SHARE = 0.2
SMALLEST_VISIBLE_PIXELS = 12.0
_SHAPE_REACH = 0.78  # half the side of a shape's patch in units of its size (a kite has its tail)


@dataclass(frozen=True)
class Scene:
    """One picture and its ground truth.

    Attributes:
        image: uint8 [H, W, 3] RGB.
        annotations: COCO annotation dicts without `image_id`; `id` counts from 1 and names the same object in
            every frame of a `SyntheticVideo`; people also have `keypoints` and `num_keypoints`.
    """

    image: npt.NDArray[np.uint8]
    annotations: list[dict[str, Any]]


@dataclass(frozen=True)
class _SceneObject:
    """One object of a scene; `category` 0 is a distractor. It moves on a small loop around `centre`."""

    category: int
    seed: int
    centre: Points
    size: float
    angle: float
    loop: Points
    tempo: Points
    phase: Points
    crowd: int = 0

    def position(self, time_s: float) -> Points:
        """x, y in pixels at a time; `centre` at 0."""
        return self.centre + self.loop * (np.sin(self.tempo * time_s + self.phase) - np.sin(self.phase))


def _draw(item: _SceneObject, time_s: float) -> tuple[Layer, npt.NDArray[np.float64] | None]:
    """The object's layer and, for a single person, its keypoints [17, 3]."""
    rng = np.random.default_rng(item.seed)
    shading, centre = object_shading(rng), item.position(time_s)
    if item.crowd:
        reach = np.array([item.size * (0.25 * item.crowd + 0.8), item.size * 1.1])
        canvas = Canvas(centre, (float(reach[0]), float(reach[1])))
        for index in range(item.crowd):
            place = np.array([(index - 0.5 * (item.crowd - 1)) * 0.45, rng.uniform(-0.22, 0.22)]) * item.size
            if item.category == PERSON:
                draw_person(canvas, rng, centre + place, item.size * rng.uniform(0.85, 1.1), time_s)
            else:
                SHAPES[item.category][2](canvas, rng, centre + place, item.size, rng.normal(0, 0.3), time_s)
        return canvas.layer(shading), None
    if item.category == PERSON:
        canvas = Canvas(centre, REACH * item.size)
        keypoints = draw_person(canvas, rng, centre, item.size, time_s)
        return canvas.layer(shading), keypoints
    draw = SHAPES[item.category][2] if item.category else draw_distractor
    canvas = Canvas(centre, _SHAPE_REACH * item.size)
    draw(canvas, rng, centre, item.size, item.angle + 0.1 * np.sin(2.0 * time_s), time_s)
    return canvas.layer(shading), None


def _overlap(low: int, length: int, limit: int) -> tuple[slice, slice]:
    """Slices of the image and of the patch where a patch at `low` covers the range 0..limit."""
    first, last = max(low, 0), max(min(low + length, limit), max(low, 0))
    return slice(first, last), slice(first - low, last - low)


def _scale(part: slice) -> slice:
    return slice(part.start * SUPERSAMPLING, part.stop * SUPERSAMPLING)


class SyntheticVideo:
    """A scene in which objects drift, people swing their limbs, balls roll and clocks run.

    Args:
        seed: an integer or a sequence of them; decides everything together with `image_size`.
        image_size: (height, width) in pixels.
        objects: how many objects to place (nearly hidden ones are then taken out); None draws the number.
    """

    def __init__(self, seed: int | Sequence[int], image_size: tuple[int, int], objects: int | None = None) -> None:
        self.image_size = (int(image_size[0]), int(image_size[1]))
        rng = np.random.default_rng(seed)
        self._background: npt.NDArray[np.float32] = background(rng, self.image_size)
        self._items = _sample_objects(rng, self.image_size, objects)
        gain, contrast = rng.uniform(0.8, 1.12), rng.uniform(0.8, 1.1)
        self._tone = (np.float32(gain * contrast), np.float32(110.0 * gain * (1 - contrast)))
        self._blur = float(rng.uniform(0.4, 0.9)) if rng.uniform() < 0.3 else 0.0
        grain = rng.standard_normal((*self.image_size, 1), np.float32)
        self._grain = grain * np.float32(rng.uniform(1.0, 7.0))
        # What starts nearly hidden is taken out of the scene, so that no unlabelled bit of it is seen.
        drawn = [_draw(item, 0.0) for item in self._items]
        visible = self._visible_parts([layer for layer, _ in drawn])
        kept = [
            index
            for index, item in enumerate(self._items)
            if item.category == 0 or _is_annotated(drawn[index][0], visible[index])
        ]
        self._items = [self._items[index] for index in kept]
        self._first = [drawn[index] for index in kept]

    def _visible_parts(self, layers: list[Layer]) -> list[npt.NDArray[np.bool_]]:
        """Supersampled patches: True where the object shows at least a pixel wide, nothing nearer being over it."""
        height, width = self.image_size
        taken = np.zeros((height * SUPERSAMPLING, width * SUPERSAMPLING), bool)
        visible: list[npt.NDArray[np.bool_]] = []
        for layer in reversed(layers):
            rows, patch_rows = _overlap(layer.top, layer.alpha.shape[0], height)
            columns, patch_columns = _overlap(layer.left, layer.alpha.shape[1], width)
            shown = np.zeros(layer.parts.shape, bool)
            inside = layer.parts[_scale(patch_rows), _scale(patch_columns)] > 0
            region = taken[_scale(rows), _scale(columns)]
            shown[_scale(patch_rows), _scale(patch_columns)] = inside & ~region
            region |= inside
            visible.append(_without_slivers(shown))
        return visible[::-1]

    def frame(self, time_s: float = 0.0) -> Scene:
        """Draw the scene at a moment; objects less than a fifth visible are drawn but not annotated."""
        height, width = self.image_size
        drawn = self._first if time_s == 0.0 else [_draw(item, time_s) for item in self._items]
        visible = self._visible_parts([layer for layer, _ in drawn])
        picture: npt.NDArray[Any] = self._background.copy()
        for layer, _ in drawn:
            rows, patch_rows = _overlap(layer.top, layer.alpha.shape[0], height)
            columns, patch_columns = _overlap(layer.left, layer.alpha.shape[1], width)
            region = picture[rows, columns]
            region *= 1.0 - layer.alpha[patch_rows, patch_columns, None]
            region += layer.colour[patch_rows, patch_columns]
        if self._blur:
            picture = cv2.GaussianBlur(picture, (0, 0), self._blur)
        picture = picture * self._tone[0] + (self._tone[1] + self._grain)
        annotations = []
        for number, (item, (layer, keypoints), shown) in enumerate(
            zip(self._items, drawn, visible, strict=True), start=1
        ):
            if item.category and _is_annotated(layer, shown):
                annotations.append(self._annotation(number, item, layer, shown, keypoints))
        return Scene(np.clip(picture, 0, 255).astype(np.uint8), annotations)

    def _annotation(
        self,
        number: int,
        item: _SceneObject,
        layer: Layer,
        shown: npt.NDArray[np.bool_],
        keypoints: npt.NDArray[np.float64] | None,
    ) -> dict[str, Any]:
        height, width = self.image_size
        rows, patch_rows = _overlap(layer.top, layer.alpha.shape[0], height)
        columns, patch_columns = _overlap(layer.left, layer.alpha.shape[1], width)
        annotation: dict[str, Any] = {"id": number, "category_id": item.category, "iscrowd": int(item.crowd > 0)}
        annotation |= annotation_of_mask(
            shown[_scale(patch_rows), _scale(patch_columns)],
            (columns.start, rows.start),
            self.image_size,
            supersampling=SUPERSAMPLING,
            crowd=item.crowd > 0,
        )
        if item.category == PERSON:
            labelled = np.zeros((17, 3))
            for index, (x, y, visibility) in enumerate([] if keypoints is None else keypoints):
                if not (0 <= x < width and 0 <= y < height):
                    continue
                row, column = int((y - layer.top) * SUPERSAMPLING), int((x - layer.left) * SUPERSAMPLING)
                seen = visibility == 2 and shown[row, column]
                labelled[index] = (round(x, 2), round(y, 2), 2 if seen else 1)
            annotation["keypoints"] = [
                value for x, y, visibility in labelled.tolist() for value in (x, y, int(visibility))
            ]
            annotation["num_keypoints"] = int((labelled[:, 2] > 0).sum())
        return annotation


def _without_slivers(shown: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Take out what is less than a pixel wide: it would stretch boxes for nothing that can be seen."""
    pixel = np.ones((SUPERSAMPLING, SUPERSAMPLING), np.uint8)
    return cv2.morphologyEx(shown.view(np.uint8), cv2.MORPH_OPEN, pixel).view(bool)


def _is_annotated(layer: Layer, shown: npt.NDArray[np.bool_]) -> bool:
    """Enough of the object is seen: a fifth of its whole area, and a dozen pixels."""
    area, seen = np.count_nonzero(layer.parts), np.count_nonzero(shown)
    return bool(seen >= max(SMALLEST_VISIBLE_SHARE * area, SMALLEST_VISIBLE_PIXELS * SUPERSAMPLING**2))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(max(high, low)))))


def _sample_objects(rng: np.random.Generator, image_size: tuple[int, int], objects: int | None) -> list[_SceneObject]:
    """Objects from back to front: distractors and one to eight objects, sometimes none, sometimes a crowd."""
    height, width = image_size
    side = min(height, width)
    shape_ids = sorted(SHAPES)
    if objects is None:
        objects = 0 if rng.uniform() < 0.05 else int(np.clip(rng.geometric(0.22), 1, 8))
    plan = [0] * int(rng.integers(1, 5))
    plan += [PERSON if rng.uniform() < 0.4 else int(rng.choice(shape_ids)) for _ in range(objects)]
    items: list[_SceneObject] = []
    taken: list[tuple[float, float, float]] = []
    for category in plan:
        if category == PERSON:
            size = _log_uniform(rng, max(30.0, 0.2 * side), 0.95 * height)
        else:
            size = _log_uniform(rng, max(14.0, 0.1 * side), 0.66 * side)
        centre = np.array([rng.uniform(0.05, 0.95) * width, rng.uniform(0.08, 0.92) * height])
        for _ in range(4):  # prefer free places, yet let things overlap when there is none
            near = [np.hypot(*(centre - (x, y))) < 0.45 * (size + other) for x, y, other in taken]
            if category == 0 or not any(near) or rng.uniform() < 0.25:
                break
            centre = np.array([rng.uniform(0.05, 0.95) * width, rng.uniform(0.08, 0.92) * height])
        if category:
            taken.append((float(centre[0]), float(centre[1]), size))
        upright = rng.normal(0, 0.25) if category else rng.uniform(0, 2 * np.pi)
        items.append(
            _SceneObject(
                category=category,
                seed=int(rng.integers(2**62)),
                centre=centre,
                size=size,
                angle=float(upright),
                loop=rng.uniform(0.04, 0.22, 2) * (width, 0.4 * height) * (category > 0),
                tempo=rng.uniform(0.4, 1.4, 2),
                phase=rng.uniform(0, 2 * np.pi, 2),
            )
        )
    if objects and rng.uniform() < 0.1:
        category = PERSON if rng.uniform() < 0.7 else int(rng.choice(shape_ids))
        size = _log_uniform(rng, max(18.0, 0.09 * side), 0.22 * side)
        members = int(rng.integers(6, 13))
        template = items[-1]
        items.append(
            replace(template, category=category, seed=int(rng.integers(2**62)), size=size, crowd=members,
                    centre=np.array([rng.uniform(0.2, 0.8) * width, rng.uniform(0.2, 0.8) * height]))
        )  # fmt: skip
    # Distractors lie mostly at the back; among the rest small things tend to be in front of large ones.
    depth = [rng.uniform() + (1.0 if item.category else 0.3) - 0.8 * item.size / side for item in items]
    return [items[index] for index in np.argsort(depth, kind="stable")]


def draw_scene(seed: int | Sequence[int], image_size: tuple[int, int]) -> Scene:
    """Draw one scene: the same seed and size give the same picture, whatever was drawn before.

    Args:
        seed: an integer or a sequence of them.
        image_size: (height, width) in pixels, at least 32 each.
    """
    return SyntheticVideo(seed, image_size).frame()
