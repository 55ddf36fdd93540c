"""What a fixed RoIAlign sampling ratio changes in the detections of a model with an adaptive one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.export.letterbox import letterboxed
from norton_deploy.parity.comparison import Pairing, pair_detections
from norton_deploy.parity.eager_stages import EagerStages

MEASURES = {
    "box_px": "boxes {:.2g} px",
    "score": "scores {:.2g}",
    "mask_iou": "mask IoU {:.3f}",
    "keypoint_px": "keypoints {:.2g} px",
}


@dataclass(frozen=True)
class SamplingEffect:
    """Differences between the detections of the two, paired by label and box.

    Attributes:
        detections: of the adaptive model.
        unpaired: detections of either without a partner in the other, boxes overlapping by IoU 0.5 at least.
        differences: of `MEASURES`, those there is something to compare by: (median, worst) over the pairs.
    """

    images: int
    detections: int
    unpaired: int
    differences: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON form; null for a measure that the task has not."""
        counts = {"images": self.images, "detections": self.detections, "unpaired": self.unpaired}
        return counts | {name: self.differences.get(name) for name in MEASURES}

    def sentence(self) -> str:
        """For people."""
        parts = [f"{self.unpaired} without a partner"]
        for name, (median, worst) in self.differences.items():
            parts.append(f"{MEASURES[name].format(median)} (worst {worst:.2g})")
        return (
            f"RoIAlign's sampling is adaptive in the model and fixed to 2 in the graph; effect on {self.detections} "
            f"detections in {self.images} images, median: " + ", ".join(parts)
        )


@torch.no_grad()
def measure_sampling_effect(
    adaptive: GeneralizedRCNN,
    fixed: GeneralizedRCNN,
    images: Sequence[npt.NDArray[np.uint8]],
    image_size: tuple[int, int],
) -> SamplingEffect:
    """Run both models on the same images.

    Args:
        adaptive, fixed: the same detector with either sampling; not changed.
        images: uint8 RGB [H, W, 3], letterboxed into `image_size`.
        image_size: (height, width) in pixels.
    """
    limit = int(adaptive.roi_heads.detections_per_img)
    runs = [EagerStages(model, image_size, limit) for model in (adaptive, fixed)]
    pairings: list[Pairing] = []
    detections = 0
    for image in images:
        canvas = letterboxed([image], image_size)
        first, second = (run.whole(canvas)[0] for run in runs)
        detections += len(first)
        pairings.append(pair_detections(first, second, score_threshold=0.0, max_detections=limit, score_tolerance=0.0))
    differences = {}
    for name in MEASURES:
        parts = [np.ravel(part) for pairing in pairings if (part := getattr(pairing, name)) is not None]
        if sum(map(len, parts)):
            values = np.concatenate(parts)
            worst = values.min() if name == "mask_iou" else values.max()
            differences[name] = float(np.median(values)), float(worst)
    return SamplingEffect(len(images), detections, sum(pairing.unmatched for pairing in pairings), differences)
