"""A keypoint predictor whose scores are probabilities."""

from torch import Tensor
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNPredictor


class NormalisedKeypointPredictor(KeypointRCNNPredictor):
    """torchvision's predictor with heatmaps that are normalised to log probabilities over their cells.

    The value at a decoded keypoint is then its log probability: decoding is linear with weights that sum to 1, so
    a constant passes through it. The training loss, a cross entropy over the cells, is the same either way.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, P, P] -> log probabilities [N, K, S, S]."""
        heatmaps: Tensor = super().forward(x)
        return heatmaps - heatmaps.flatten(2).logsumexp(dim=2)[:, :, None, None]
