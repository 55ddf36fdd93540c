"""A fixed number of RoIAlign samples for models whose number depends on the box.

With a sampling ratio of 0 (Detectron2's default) a cell is sampled once for each pixel that it spans on its
feature map, so that a large RoI needs more samples than a small one. A graph of fixed shapes cannot do that; it
takes 2 samples per axis. `norton_deploy.parity.sampling_effect` measures what that changes.
"""

import copy

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import MultiScaleRoIAlign

EXPORTED_SAMPLES = 2


def is_adaptive(model: GeneralizedRCNN) -> bool:
    """Whether any RoI pooling of a detector takes a number of samples that depends on the box."""
    return any(pooler.sampling_ratio <= 0 for pooler in _poolers(model))


def fix_sampling(model: GeneralizedRCNN, samples: int = EXPORTED_SAMPLES) -> GeneralizedRCNN:
    """A copy of a detector whose adaptive RoI poolings take `samples` samples per cell and axis."""
    fixed = copy.deepcopy(model)
    for pooler in _poolers(fixed):
        if pooler.sampling_ratio <= 0:
            pooler.sampling_ratio = samples
    return fixed


def _poolers(model: GeneralizedRCNN) -> list[MultiScaleRoIAlign]:
    return [layer for layer in model.modules() if isinstance(layer, MultiScaleRoIAlign)]
