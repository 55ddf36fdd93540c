"""Checkpoints in torch, eager, with torchvision's own resizing and CPDBlocks in their grouped form."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.compression.lowering import lower_model
from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Image, Predictor, not_finite
from norton_deploy.structures import TASKS, Categories, Detections, Task

MAX_BATCH = 8
SCORING_HEADS = ("rpn.head", "roi_heads.box_predictor")


class TorchPredictor(Predictor):
    """A torchvision detector on the CPU or a GPU.

    Neighbouring images of one size run as a batch of at most 8; images of different sizes never share a
    batch, because torchvision would pad them to a common size and the padding changes their results.

    Attributes:
        model: the detector, in evaluation mode, on `torch_device`.
        torch_device: where it runs.
    """

    backend = "torch"
    input_size = None

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        categories: Categories,
        *,
        name: str = "model in memory",
        score_threshold: float | None = None,
        device: str | None = None,
    ) -> None:
        """Wrap a detector; it is moved to the device and set to evaluation mode.

        Args:
            model: one of torchvision's R-CNN classes.
            task: box, mask or keypoint.
            categories: the model's labels.
            name: what to call it in messages.
            score_threshold: replaces the model's own; None keeps it.
            device: see `load_predictor`.

        Raises:
            UserError: the device is not there.
        """
        self.torch_device = choose_device(device)
        self.model = model.to(self.torch_device).eval()
        if score_threshold is not None:
            roi_heads: Any = self.model.roi_heads
            roi_heads.score_thresh = score_threshold
        self.name = name
        self.task = task
        self.categories = categories
        self.device = f"torch {torch.__version__}, {_device_name(self.torch_device)}"

    @classmethod
    def load(
        cls,
        path: Path,
        score_threshold: float | None,
        device: str | None,
        categories: Path | Categories | None = None,
    ) -> TorchPredictor:
        """From a checkpoint or torchvision's .pth, with CPDBlocks grouped and BatchNorm folded: equal to rounding, and
        faster.

        Raises:
            UserError: not a detector's checkpoint, or the device is not there.
        """
        checkpoint = open_model(str(path), categories=categories)
        header = checkpoint.header
        if header.task == "cls":
            raise UserError(f"{path}: a checkpoint of task '{header.task}', expected {', '.join(TASKS)}")
        return cls(
            lower_model(checkpoint.model.eval()),
            header.task,
            header.categories,
            name=str(path),
            score_threshold=score_threshold,
            device=device,
        )

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        detections: list[Detections] = []
        for batch in _batches(images):
            started = time.perf_counter()
            inputs = [torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1) for image in batch]
            started = self.timing.add("preprocess_ms", started)
            # Bytes cross to the device, four times fewer than floats; the division happens there.
            inputs = [to_unit_range(image.to(self.torch_device)) for image in inputs]
            self._synchronise()
            started = self.timing.add("copy_ms", started)
            with torch.inference_mode(), full_precision(), self._finite_scores():
                outputs = self.model(inputs)
            self._synchronise()
            started = self.timing.add("infer_ms", started)
            for output, image in zip(outputs, batch, strict=True):
                detections.append(self._to_detections(output, (image.shape[0], image.shape[1])))
            self.timing.add("postprocess_ms", started)
        return detections

    @contextmanager
    def _finite_scores(self) -> Iterator[None]:
        """Looks at the logits of proposals and classes meanwhile: NaN among them leaves no detection and no trace."""

        def check(_module: nn.Module, _inputs: Any, outputs: Any) -> None:
            if not all(bool(logits.isfinite().all()) for logits in _tensors(outputs[0])):
                raise not_finite(self.name, "the scores that it computed")

        handles = [self.model.get_submodule(head).register_forward_hook(check) for head in SCORING_HEADS]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _to_detections(self, output: dict[str, Tensor], image_size: tuple[int, int]) -> Detections:
        # Thresholded before the copy: a quarter of the bytes. 0.5 is torchvision's and COCO's usual cut.
        arrays = {
            name: (value[:, 0] > 0.5 if name == "masks" else value).cpu().numpy() for name, value in output.items()
        }
        keypoints = arrays.get("keypoints")
        if keypoints is not None:
            keypoints = keypoints.astype(np.float32)
            keypoints[:, :, 2] = arrays["keypoints_scores"]
        detections = Detections(
            arrays["boxes"].astype(np.float32),
            arrays["scores"].astype(np.float32),
            arrays["labels"].astype(np.int64),
            image_size,
            arrays.get("masks"),
            keypoints,
        )
        return detections[np.isin(detections.labels, self.categories.labels)]

    def _synchronise(self) -> None:
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 means fp32: no product is rounded to TF32, as cuDNN's convolutions are by default."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul


def to_unit_range(pixels: Tensor) -> Tensor:
    """Bytes 0..255 -> float32 0..1, as torchvision's detectors take them."""
    return pixels.float().div_(255)


def choose_device(device: str | None) -> torch.device:
    """The torch device of a name ("cpu", "cuda", "cuda:N"); None takes a GPU if there is one.

    Raises:
        UserError: unknown name, or no such GPU.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise UserError(f"device '{device}': expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index or 0) >= count:
        raise UserError(f"device '{device}': this machine has {count} CUDA GPU(s) that work; use cpu")
    return torch.device(device)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def _tensors(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _batches(images: Sequence[Image]) -> Iterator[list[Image]]:
    """Neighbours of one shape together, at most MAX_BATCH."""
    for _, group in groupby(images, key=lambda image: image.shape):
        members = list(group)
        for first in range(0, len(members), MAX_BATCH):
            yield members[first : first + MAX_BATCH]
