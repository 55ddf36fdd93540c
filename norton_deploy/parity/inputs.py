"""What a graph is fed for the parity check, and its results in the pixels of the image that the detector sees."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.export.letterbox import Letterbox

Image = npt.NDArray[np.uint8]
Arrays = dict[str, npt.NDArray[Any]]


def canvases(images: Sequence[Image], batch: int, size: tuple[int, int]) -> Iterator[Image]:
    """Letterboxed batches uint8 [batch, H, W, 3]; the last one is filled up from the first images."""
    canvas_list: list[Image] = []
    padded = [*images, *(images[index % len(images)] for index in range(-len(images) % batch))]
    for image in padded:
        canvas = np.empty((*size, 3), np.uint8)
        Letterbox.fit((image.shape[0], image.shape[1]), size).place(image, canvas)
        canvas_list.append(canvas)
    for start in range(0, len(canvas_list), batch):
        yield np.stack(canvas_list[start : start + batch])


def as_planes(images: Image) -> npt.NDArray[np.float32]:
    """uint8 [B, H, W, 3] -> float32 [B, 3, H, W], 0..1."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255))


def resize_difference(frames: Image, canvas: npt.NDArray[np.float32]) -> float:
    """Largest difference, in levels of 255, of a graph's letterboxed frames from the predictor's.

    Args:
        frames: uint8 [B, H, W, 3], as the graph was fed.
        canvas: float32 [B, H', W', 3], as it resized them.
    """
    [expected] = canvases(list(frames), len(frames), (canvas.shape[1], canvas.shape[2]))
    return float(np.abs(canvas - expected).max())


def to_canvas(outputs: Arrays, letterbox: Letterbox) -> Arrays:
    """A graph's outputs with boxes and keypoints in canvas pixels instead of the frame's."""
    x_factor, y_factor = letterbox.factors
    changed = {"boxes": outputs["boxes"] / np.array([x_factor, y_factor] * 2, np.float32)}
    if "keypoints" in outputs:
        changed["keypoints"] = outputs["keypoints"] / np.array([x_factor, y_factor, 1], np.float32)
    return outputs | changed


def canvas_stages(stages: Arrays) -> Arrays:
    """The outputs of a graph that resizes, as they were in canvas pixels."""
    return {name.removeprefix("canvas_"): value for name, value in stages.items() if name.startswith("canvas_")}
