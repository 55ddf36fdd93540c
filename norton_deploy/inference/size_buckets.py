"""Several static graphs of different shapes behind one predictor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Image, Predictor, StageTiming
from norton_deploy.structures import Detections


class SizeBucketPredictor(Predictor):
    """Sends each image to the graph whose aspect ratio is nearest, so that little of its input is padding.

    A landscape and a portrait graph (800x1088, 1088x800) serve most photographs. What the letterboxing that
    remains costs in AP is a matter for `eval_det` on this predictor.
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        """Join loaded predictors of one model.

        Raises:
            UserError: they disagree in task or categories, come from different weights, one takes any size
                already, or two have the same aspect ratio.
        """
        first = predictors[0]
        names = ", ".join(predictor.name for predictor in predictors)
        for other in predictors:
            if other.input_size is None:
                raise UserError(f"{other.name}: takes any image size; size buckets are for exported graphs")
            if (other.task, other.categories) != (first.task, first.categories):
                raise UserError(f"{other.name} and {first.name}: another task or other categories; not one model")
            if _weights(other) != _weights(first):
                raise UserError(f"{other.name} and {first.name} were exported from different weights")
        self._buckets = [(_log_aspect(predictor.input_size or (1, 1)), predictor) for predictor in predictors]
        if len({round(aspect, 6) for aspect, _ in self._buckets}) < len(predictors):
            raise UserError(f"{names}: two graphs have the same aspect ratio; keep one of them")
        self.name = names
        self.backend = first.backend
        self.task = first.task
        self.categories = first.categories
        self.input_size = None
        self.device = first.device

    def bucket_of(self, image_size: tuple[int, int]) -> Predictor:
        """The predictor whose aspect ratio is nearest (in the logarithm) to (height, width)."""
        aspect = _log_aspect(image_size)
        return min(self._buckets, key=lambda bucket: abs(bucket[0] - aspect))[1]

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        members: dict[int, list[int]] = {}
        chosen = [self.bucket_of((image.shape[0], image.shape[1])) for image in images]
        for position, predictor in enumerate(chosen):
            members.setdefault(id(predictor), []).append(position)
        found: dict[int, Detections] = {}
        timing = StageTiming()
        for positions in members.values():
            predictor = chosen[positions[0]]
            found.update(zip(positions, predictor([images[position] for position in positions]), strict=True))
            timing += predictor.timing
        self.timing = timing
        return [found[position] for position in range(len(images))]


def _log_aspect(image_size: tuple[int, int]) -> float:
    return math.log(image_size[0] / image_size[1])


def _weights(predictor: Predictor) -> str:
    contract = getattr(predictor, "contract", None)
    return contract.weights_sha256 if contract is not None else ""
