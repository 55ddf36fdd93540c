"""What a fixed RoIAlign sampling ratio changes in the detections of a model with an adaptive one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.export.letterbox import place_images
from norton_deploy.parity.comparison import Pairing, pair_detections
from norton_deploy.parity.eager_stages import EagerStages


@dataclass(frozen=True)
class SamplingEffect:
    """Differences between the detections of the two, paired by label and box.

    Attributes:
        images: compared.
        detections: of the adaptive model.
        unpaired: detections of either without a partner in the other, boxes overlapping by IoU 0.5 at least.
        box_px, score, mask_iou, keypoint_px: (median, worst) over the pairs; None where there is nothing to compare.
    """

    images: int
    detections: int
    unpaired: int
    box_px: tuple[float, float] | None
    score: tuple[float, float] | None
    mask_iou: tuple[float, float] | None
    keypoint_px: tuple[float, float] | None

    def sentence(self) -> str:
        """For people."""
        parts = [f"{self.unpaired} without a partner"]
        for name, pair in (
            ("boxes {:.2g} px", self.box_px),
            ("scores {:.2g}", self.score),
            ("mask IoU {:.3f}", self.mask_iou),
            ("keypoints {:.2g} px", self.keypoint_px),
        ):
            if pair is not None:
                parts.append(name.format(pair[0]) + f" (worst {pair[1]:.2g})")
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
        canvas = np.empty((1, *image_size, 3), np.uint8)
        place_images([image], canvas)
        first, second = (run.whole(canvas)[0] for run in runs)
        detections += len(first)
        pairings.append(pair_detections(first, second, score_threshold=0.0, max_detections=limit, score_tolerance=0.0))
    return SamplingEffect(
        images=len(images),
        detections=detections,
        unpaired=sum(pairing.unmatched for pairing in pairings),
        box_px=_median_and_worst([pairing.box_px for pairing in pairings]),
        score=_median_and_worst([pairing.score for pairing in pairings]),
        mask_iou=_median_and_worst([pairing.mask_iou for pairing in pairings], lowest_is_worst=True),
        keypoint_px=_median_and_worst([pairing.keypoint_px for pairing in pairings]),
    )


def _median_and_worst(
    parts: Sequence[npt.NDArray[np.float32] | None], *, lowest_is_worst: bool = False
) -> tuple[float, float] | None:
    values = [part.reshape(-1) for part in parts if part is not None]
    if not values or not sum(part.size for part in values):
        return None
    everything = np.concatenate(values)
    return float(np.median(everything)), float(everything.min() if lowest_is_worst else everything.max())
