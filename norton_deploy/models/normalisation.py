"""The normalisation policy of a backbone, stated once.

frozen: BatchNorm with fixed statistics and affine terms. For a pretrained backbone: a detector's batch is
    too small (1-4 images a device) to estimate statistics better than the pretraining did.
batch: live BatchNorm. For a backbone that starts from nothing, or is compressed and not yet re-estimated.
sync: live BatchNorm with statistics over all processes. As batch, when each process sees few images.
group: GroupNorm. Independent of the batch; for training from nothing with one image a device.
"""

from collections.abc import Callable
from math import gcd
from typing import Literal

from torch import nn
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen", "batch", "sync", "group"]
GROUPS = 32


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with as many of 32 groups as divide the channels (pruned widths are seldom multiples)."""
    return nn.GroupNorm(gcd(GROUPS, channels), channels, eps)


NORM_LAYERS: dict[Norm, Callable[..., nn.Module]] = {
    "frozen": FrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": group_norm,
}
