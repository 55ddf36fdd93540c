"""One call for every kind of model file: images in, detections out."""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError
from norton_deploy.structures import Categories, Detections, Task

Backend = Literal["torch", "onnxruntime", "openvino", "tensorrt", "aotinductor"]
FloatType = Literal["fp32", "bf16", "fp16"]
"""In what an engine computes floats: bf16 is OpenVINO's, fp16 torch's on a GPU."""
Image = npt.NDArray[np.uint8]


@dataclass
class StageTiming:
    """Wall-clock time of one call, in milliseconds, the device synchronised at every boundary.

    Attributes:
        decode_ms: reading image files; 0 when the call was given arrays.
        preprocess_ms: letterboxing and conversion to the model's input, on the host.
        copy_ms: host to device and back; 0 where both are the same memory.
        infer_ms: the model. For torch this includes torchvision's own resizing and post-processing.
        postprocess_ms: mapping back to the image, pasting masks, making `Detections`.
    """

    decode_ms: float = 0.0
    preprocess_ms: float = 0.0
    copy_ms: float = 0.0
    infer_ms: float = 0.0
    postprocess_ms: float = 0.0

    @property
    def total_ms(self) -> float:
        """Sum of all stages."""
        return self.decode_ms + self.preprocess_ms + self.copy_ms + self.infer_ms + self.postprocess_ms

    def __add__(self, other: StageTiming) -> StageTiming:
        """Stage by stage sum."""
        mine, theirs = vars(self), vars(other)
        return StageTiming(**{stage: mine[stage] + theirs[stage] for stage in mine})

    def add(self, stage: str, started: float) -> float:
        """Add the time since `started` (seconds, `time.perf_counter`) to a stage; returns the time now."""
        now = time.perf_counter()
        setattr(self, stage, getattr(self, stage) + (now - started) * 1e3)
        return now


class Predictor(ABC):
    """A loaded detector; `predictor(images)` returns one `Detections` per image, in that image's pixels.

    Any number of threads may call one predictor: they take turns, and what a call returned is its own (no later call
    changes it). For two calls at the same time load two predictors.

    Attributes:
        name: the file it came from.
        backend: torch, onnxruntime, openvino, tensorrt or aotinductor.
        task: box, mask or keypoint.
        categories: its labels, COCO ids and names.
        input_size: (height, width) of the graph's input, or None when the model takes any size.
        device: what it runs on, in words.
        overlaps: whether `stream` has several images under way.
        timing: stages of the last call, whichever thread made it.
    """

    name: str
    backend: Backend
    task: Task
    categories: Categories
    input_size: tuple[int, int] | None
    device: str
    overlaps: bool = False
    timing = StageTiming()
    _turn: threading.RLock

    def __new__(cls, *_: object, **__: object) -> Self:
        """With the lock of its calls: here, where no subclass can leave it out."""
        predictor = super().__new__(cls)
        predictor._turn = threading.RLock()
        return predictor

    def __call__(self, images: Sequence[Image]) -> list[Detections]:
        """Detect in any number of images of any sizes.

        Args:
            images: a list (or array) of uint8 arrays [H, W, 3] in RGB; not a generator.

        Raises:
            UserError: it is no list; an image is empty, is not uint8 or not [H, W, 3], or does not fit a graph that was
                exported without letterboxing; or the model computed numbers that are not finite.
        """
        if not isinstance(images, Sequence | np.ndarray):
            raise UserError(f"{self.name}: expected a list of images, got a {type(images).__name__}; give list(images)")
        for position, image in enumerate(images):
            check_image(image, f"image {position + 1} of {len(images)}")
        with self._turn:
            self.timing = StageTiming()
            return self._detect(images)

    def stream(self, images: Iterable[Image]) -> Iterator[Detections]:
        """Detections of one image after the other; exported graphs prepare the next image and finish the last one while
        they compute. That is throughput: one image alone takes as long as a call.

        Args:
            images: as for a call; may be a generator, which is read at most two images ahead.

        Raises:
            UserError: as a call.
        """
        for image in images:
            yield self([image])[0]

    def predict_files(self, paths: Sequence[str | Path]) -> list[tuple[Image, Detections]]:
        """Decode files and detect in them; decoding is part of `timing`.

        Returns:
            For each file the decoded image, uint8 RGB [H, W, 3], and what was found in it.

        Raises:
            UserError: a file is missing or is not an image.
        """
        started = time.perf_counter()
        images = [read_image(path) for path in paths]
        decode_ms = (time.perf_counter() - started) * 1e3
        with self._turn:
            detections = self(images)
            self.timing.decode_ms = decode_ms
        return list(zip(images, detections, strict=True))

    @abstractmethod
    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        """Detect in checked images and fill `self.timing`."""


def not_finite(name: str, what: str) -> UserError:
    """What to say of a model whose numbers are NaN or infinite: it would find nothing and not say why."""
    return UserError(
        f"{name}: {what} are not finite; its weights are broken (a training that diverged?) or its precision is too "
        "low for them (try fp32)"
    )


def check_image(image: Image, where: str) -> None:
    """Refuse what is no uint8 RGB image, saying `where` it is."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise UserError(f"{where}: expected a uint8 NumPy array [H, W, 3] in RGB, got {kind}")
    if image.ndim != 3 or image.shape[2] != 3:
        raise UserError(f"{where}: expected shape [H, W, 3] (RGB), got {list(image.shape)}")
    if 0 in image.shape:
        raise UserError(f"{where}: empty image {list(image.shape)}; give at least one pixel")
