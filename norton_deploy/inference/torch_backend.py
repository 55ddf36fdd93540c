"""Checkpoints in torch, with torchvision's own resizing and CPDBlocks in their grouped form.

On a GPU they run as CUDA graphs. A graph belongs to one size of frames. It is recorded when the size comes a second
time, so that a folder of photographs of all sizes does not wait for graphs that are used once.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.compression.lowering import lower_model
from norton_deploy.data.transforms import to_unit_range
from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import Letterbox
from norton_deploy.export.static_rcnn import mask_paste_of
from norton_deploy.inference.cuda_graph import FRAMES_IN_FLIGHT, Arrays, FixedCall, InFlight
from norton_deploy.inference.predictor import FloatType, Image, Predictor, StageTiming, check_image, not_finite
from norton_deploy.inference.static_graph import decode_outputs
from norton_deploy.inference.torch_graph import FINITE, FrameDetector, can_be_static
from norton_deploy.structures import TASKS, Categories, Detections, Task

logger = logging.getLogger(__name__)
MAX_BATCH = 8
MAX_GRAPHS = 4
"""Recorded sizes that are kept, the last used; each has the weights again."""
SCORING_HEADS = ("rpn.head", "roi_heads.box_predictor")


class TorchPredictor(Predictor):
    """A torchvision detector on the CPU, or on a GPU as CUDA graphs.

    A graph finds what eager mode finds, to rounding; a batch whose shortcuts were not exact, or a size that cannot be
    recorded, is left to eager mode. Neighbouring images of one size run as a batch of at most 8; images of different
    sizes never share a batch: torchvision would pad them to a common size, and the padding changes their results.

    Attributes:
        model: the detector, in evaluation mode, on `torch_device`.
        float_type: fp32, or fp16 as in `norton_deploy.export.precision`; what eager mode does is in fp32.
        records: whether sizes that come again get a module of fixed shapes; without, all is eager.
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
        float_type: FloatType = "fp32",
        graphs: bool | None = None,
    ) -> None:
        """Wrap a detector; it is moved to the device and set to evaluation mode.

        Args:
            model: one of torchvision's R-CNN classes.
            name: what to call it in messages.
            score_threshold: replaces the model's own; None keeps it.
            graphs: whether sizes that come again get a module of fixed shapes; None: on a GPU, where it is recorded.

        Raises:
            UserError: the device is not there, or cannot compute in `float_type`.
        """
        self.torch_device = choose_device(device)
        on_gpu = self.torch_device.type == "cuda"
        self.records = self.overlaps = (on_gpu if graphs is None else graphs) and can_be_static(model)
        if float_type not in ("fp32", "fp16") or (float_type == "fp16" and not self.records):
            raise UserError(f"{name}: float_type {float_type}: torch computes in fp32, on a GPU also in fp16; use fp32")
        self.float_type = float_type
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], FixedCall | None] = {}
        self.model = model.to(self.torch_device).eval()
        if score_threshold is not None:
            roi_heads: Any = self.model.roi_heads
            roi_heads.score_thresh = score_threshold
        self.name = name
        self.task = task
        self.categories = categories
        launch = ", CUDA graphs" if self.records and on_gpu else ""
        self.device = f"torch {torch.__version__}, {device_name(self.torch_device)}, {float_type}{launch}"

    @classmethod
    def load(
        cls,
        path: Path,
        score_threshold: float | None,
        device: str | None,
        categories: Path | Categories | None = None,
        float_type: FloatType = "fp32",
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
            float_type=float_type,
        )

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        detections: list[Detections] = []
        for batch in _batches(images):
            graph = self._graph((len(batch), *batch[0].shape)) if self.records else None
            if graph is None:
                detections += self._eager(batch)
                continue
            started = time.perf_counter()
            with torch.no_grad(), full_precision(search=True):
                outputs = graph(np.stack(batch))
            self.timing.add("infer_ms", started)
            detections += self._finish(outputs, batch)
        return detections

    def stream(self, images: Iterable[Image]) -> Iterator[Detections]:
        if not self.records:
            yield from super().stream(images)
            return
        self.timing = StageTiming()
        running: deque[tuple[Callable[[], Arrays] | None, Image]] = deque()
        with ExitStack() as stack:
            flights: dict[FixedCall, InFlight] = {}
            for position, image in enumerate(images):
                check_image(image, f"image {position + 1}")
                with self._turn, torch.no_grad(), full_precision(search=True):
                    graph = self._graph((1, *image.shape))
                    if graph is not None and graph not in flights:
                        flights[graph] = stack.enter_context(graph.in_flight())
                    running.append((None if graph is None else flights[graph].submit(image[None]), image))
                if len(running) == FRAMES_IN_FLIGHT:
                    yield self._finish_one(*running.popleft())
            while running:
                yield self._finish_one(*running.popleft())

    def _finish_one(self, wait: Callable[[], Arrays] | None, image: Image) -> Detections:
        with self._turn:
            if wait is None:
                return self._eager([image])[0]
            started = time.perf_counter()
            outputs = wait()
            self.timing.add("infer_ms", started)
            return self._finish(outputs, [image])[0]

    def _eager(self, batch: list[Image]) -> list[Detections]:
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
        detections = [
            self._to_detections(output, (image.shape[0], image.shape[1]))
            for output, image in zip(outputs, batch, strict=True)
        ]
        self.timing.add("postprocess_ms", started)
        return detections

    def _graph(self, shape: tuple[int, ...]) -> FixedCall | None:
        """The recorded call for batches of `shape` [B, H, W, 3], if there is one by now."""
        self._seen[shape] += 1
        if shape in self._graphs:
            self._graphs[shape] = self._graphs.pop(shape)  # the last used stands last
        elif self._seen[shape] > 1 or self.float_type == "fp16":
            while len(self._graphs) >= MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]
            batch, height, width, _ = shape
            with torch.no_grad(), full_precision(search=True):
                try:
                    module = FrameDetector(self.model, (height, width), batch, self.float_type)
                    self._graphs[shape] = FixedCall(module, shape, self.torch_device)
                except (RuntimeError, UserError) as error:
                    if self.float_type == "fp16":
                        raise
                    reason = str(error).splitlines()[0]
                    logger.warning("%s: no CUDA graph for %dx%d images (%s)", self.name, height, width, reason)
                    self._graphs[shape] = None
        return self._graphs.get(shape)

    def _finish(self, outputs: Arrays, batch: list[Image]) -> list[Detections]:
        """What a graph found, or eager mode where one of its shortcuts was not exact."""
        started = time.perf_counter()
        if not outputs[FINITE].all():
            raise not_finite(self.name, "the scores that it computed")
        if not (outputs["nms_converged"].all() and outputs["candidates_complete"].all()):
            return self._eager(batch)
        image_size = (batch[0].shape[0], batch[0].shape[1])
        as_it_is, paste = Letterbox.fit(image_size, image_size), mask_paste_of(self.model)
        found = [decode_outputs(outputs, index, as_it_is, self.categories.labels, paste) for index in range(len(batch))]
        self.timing.add("postprocess_ms", started)
        return found

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
def full_precision(*, search: bool = False) -> Iterator[None]:
    """fp32 means fp32: no product is rounded to TF32, as cuDNN's convolutions are by default.

    Args:
        search: let cuDNN try its algorithms, for shapes that stay.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    # One by one: `cudnn.flags` would switch cuDNN off.
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    cudnn.benchmark = cudnn.benchmark or search
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


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


def device_name(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' * (threads > 1)}"


def _tensors(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else outputs


def _batches(images: Sequence[Image]) -> Iterator[list[Image]]:
    """Neighbours of one shape together, at most MAX_BATCH."""
    for _, group in groupby(images, key=lambda image: image.shape):
        members = list(group)
        for first in range(0, len(members), MAX_BATCH):
            yield members[first : first + MAX_BATCH]
