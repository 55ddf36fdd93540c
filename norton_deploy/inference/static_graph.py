"""What every exported graph shares: fixed input shape, letterboxing, padded batches, decoding the outputs."""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import cycle, islice

import numpy as np
import numpy.typing as npt

from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.letterbox import Letterbox, clip_boxes, place_images
from norton_deploy.inference.predictor import Image, Predictor, StageTiming, check_image, not_finite
from norton_deploy.masks import MaskPaste, MasksInBoxes
from norton_deploy.structures import Detections

logger = logging.getLogger(__name__)
Outputs = dict[str, npt.NDArray[np.generic]]
Start = Callable[[npt.NDArray[np.generic]], Callable[[], Outputs]]
"""Starts a batch and returns what waits for its outputs."""
CHECKED = {"boxes", "scores", "keypoints"}
"""Outputs that must be finite; masks have a hundred times as many numbers and follow from the same features."""


class StaticGraphPredictor(Predictor):
    """A predictor over a graph with a `GraphContract`; a subclass only runs one batch of the graph.

    The last batch is padded to the graph's batch size with blank images, whose detections are ignored.

    Attributes:
        contract: what the graph says about itself.
        inexact_batches: batches for which the graph flagged that one of its shortcuts was not exact.
    """

    overlaps = True
    contract: GraphContract
    inexact_batches: int = 0

    def __init__(self, name: str, contract: GraphContract, score_threshold: float | None) -> None:
        baked_in = contract.score_threshold
        if score_threshold is not None and baked_in is not None and score_threshold < baked_in:
            raise UserError(
                f"{name}: score_threshold {score_threshold} is below {baked_in}, where the graph already "
                "cuts; export it with a lower threshold"
            )
        self.name = name
        self.contract = contract
        self.task = contract.task
        self.categories = contract.categories
        self.input_size = contract.input_size
        self.timing = StageTiming()
        self._score_threshold = 0.0 if score_threshold is None else score_threshold
        self._canvas = np.empty((contract.batch, *contract.input_size, 3), np.uint8)

    @abstractmethod
    def run(self, batch: npt.NDArray[np.generic]) -> Outputs:
        """Run the graph on one full batch (shape and dtype of the contract), return its outputs by name.

        Adds its time to `self.timing.copy_ms` and `self.timing.infer_ms`.
        """

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        detections: list[Detections] = []
        batch_size = self.contract.batch
        for first in range(0, len(images), batch_size):
            letterboxes, batch = self._prepare(images[first : first + batch_size], self._canvas)
            detections += self._finish(self.run(batch), letterboxes)
        return detections

    def stream(self, images: Iterable[Image]) -> Iterator[Detections]:
        self.timing = StageTiming()
        canvases = [np.empty_like(self._canvas) for _ in range(2)]
        frames, running = iter(images), list[tuple[Callable[[], Outputs], list[Letterbox]]]()
        with self._starting() as start:
            for canvas in cycle(canvases):
                chunk = list(islice(frames, self.contract.batch))
                for position, image in enumerate(chunk):
                    check_image(image, f"image {position + 1} of {len(chunk)}")
                if chunk:
                    letterboxes, batch = self._prepare(chunk, canvas)
                    running.append((start(batch), letterboxes))
                if len(running) > 1 or (running and not chunk):
                    outputs, letterboxes = running.pop(0)
                    yield from self._finish(outputs(), letterboxes)
                elif not chunk:
                    return

    @contextmanager
    def _starting(self) -> Iterator[Start]:
        """How `stream` has a batch computed: here by a thread of its own."""
        with ThreadPoolExecutor(1) as engine:
            yield lambda batch: engine.submit(self._run_in_turn, batch).result

    def _timed(self, outputs: Callable[[], Outputs]) -> Outputs:
        started = time.perf_counter()
        found = outputs()
        self.timing.add("infer_ms", started)
        return found

    def _run_in_turn(self, batch: npt.NDArray[np.generic]) -> Outputs:
        with self._turn:
            return self.run(batch)

    def _prepare(
        self, images: Sequence[Image], canvas: npt.NDArray[np.uint8]
    ) -> tuple[list[Letterbox], npt.NDArray[np.generic]]:
        """Images letterboxed into `canvas` [B, H, W, 3], and as the graph takes them."""
        started = time.perf_counter()
        for image in images:
            self._check_size((image.shape[0], image.shape[1]))
        letterboxes = place_images(images, canvas)
        batch = to_graph_input(canvas, self.contract.input_dtype)
        self.timing.add("preprocess_ms", started)
        return letterboxes, batch

    def _finish(self, outputs: Outputs, letterboxes: Sequence[Letterbox]) -> list[Detections]:
        """Detections of a batch's images, the blank ones at its end left out."""
        started = time.perf_counter()
        for name in sorted(CHECKED & outputs.keys()):
            if not np.isfinite(outputs[name][: len(letterboxes)]).all():
                raise not_finite(self.name, f"its {name}")
        self._check_flags(outputs)
        labels, mask_paste = self.categories.labels, self.contract.mask_paste
        found = [
            decode_outputs(outputs, index, letterbox, labels, mask_paste, self._score_threshold)
            for index, letterbox in enumerate(letterboxes)
        ]
        self.timing.add("postprocess_ms", started)
        return found

    def _check_flags(self, outputs: Outputs) -> None:
        """Count, and the first time warn about, batches whose result may differ from the eager model's."""
        failed = [name for name in self.contract.flags if not np.all(outputs[name])]
        if failed and not self.inexact_batches:
            logger.warning(
                "%s: %s is false: detections of this batch may differ from the eager model's "
                "(export with more nms_iterations or candidates); further cases are only counted",
                self.name,
                " and ".join(failed),
            )
        self.inexact_batches += bool(failed)

    def _check_size(self, image_size: tuple[int, int]) -> None:
        """Only a graph whose contract leaves resizing to us takes images of another size than its input's."""
        contract = self.contract
        if contract.resize == "letterbox" or image_size == contract.input_size:
            return
        (height, width), given = contract.input_size, f"{image_size[0]}x{image_size[1]}"
        advice = (
            f"export with --input-size {image_size[0]} {image_size[1]}, or without it for any size"
            if contract.resize == "graph"
            else "resize them or export with letterboxing"
        )
        raise UserError(
            f"{self.name}: takes images of exactly {height}x{width} (height x width), got {given}; {advice}"
        )


def to_graph_input(canvas: npt.NDArray[np.uint8], input_dtype: str) -> npt.NDArray[np.generic]:
    """Canvas uint8 [B, H, W, 3] -> the same for "uint8", float32 [B, 3, H, W] in 0..1 for "float32"."""
    if input_dtype == "uint8":
        return canvas
    planes = np.empty((canvas.shape[0], 3, *canvas.shape[1:3]), np.float32)
    np.multiply(canvas.transpose(0, 3, 1, 2), np.float32(1 / 255), out=planes)
    return planes


def decode_outputs(
    outputs: Outputs,
    index: int,
    letterbox: Letterbox,
    labels: Collection[int],
    mask_paste: MaskPaste,
    score_threshold: float = 0.0,
) -> Detections:
    """The detections of one image of a batch, in that image's pixels.

    Boxes that lie in the padding only, and labels that no category has, are dropped. Masks keep
    the box as the graph gave it, before it is clipped to the image, since that is the frame they live in.

    Args:
        outputs: the graph's outputs (see `GraphContract.output_names`).
        index: which image of the batch.
        letterbox: how that image lay in the graph's input.
        labels: those that exist.
        mask_paste: how masks come into the image, see `GraphContract`.
        score_threshold: detections below it are dropped.
    """
    count = int(outputs["num_detections"][index])
    scores = np.asarray(outputs["scores"][index, :count], np.float32)
    found_labels = np.asarray(outputs["labels"][index, :count], np.int64)
    graph_boxes = letterbox.boxes_to_image(np.asarray(outputs["boxes"][index, :count], np.float32))
    boxes = clip_boxes(graph_boxes, letterbox.image_size)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    kept &= (scores >= score_threshold) & np.isin(found_labels, list(labels))
    order = np.flatnonzero(kept)
    order = order[np.argsort(-scores[order], kind="stable")]
    masks = keypoints = None
    if "masks" in outputs:
        probabilities = np.asarray(outputs["masks"][index], np.float32)[order]
        masks = MasksInBoxes(probabilities, graph_boxes[order], letterbox.image_size, mask_paste)
    if "keypoints" in outputs:
        keypoints = letterbox.keypoints_to_image(np.asarray(outputs["keypoints"][index], np.float32)[order])
    return Detections(boxes[order], scores[order], found_labels[order], letterbox.image_size, masks, keypoints)
