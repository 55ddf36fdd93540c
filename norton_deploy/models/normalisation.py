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

from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import FrozenBatchNorm2d

Norm = Literal["frozen", "batch", "sync", "group"]
GROUPS = 32


class TypedFrozenBatchNorm2d(FrozenBatchNorm2d):
    """`FrozenBatchNorm2d` whose result has its input's type.

    torchvision's gives float32 for half-precision inputs, so that under autocast twice the bytes go through every
    activation and residual sum after it. PyTorch's BatchNorm with the same fixed statistics computes in float32
    too, but in one pass and without changing the type.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> the same shape and type; in the layer's own type exactly torchvision's result."""
        if x.dtype == self.weight.dtype:
            result: Tensor = super().forward(x)
            return result
        return functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


def group_norm(channels: int, eps: float = 1e-5) -> nn.GroupNorm:
    """GroupNorm with as many of 32 groups as divide the channels (pruned widths are seldom multiples)."""
    return nn.GroupNorm(gcd(GROUPS, channels), channels, eps)


NORM_LAYERS: dict[Norm, Callable[..., nn.Module]] = {
    "frozen": TypedFrozenBatchNorm2d,
    "batch": nn.BatchNorm2d,
    "sync": nn.SyncBatchNorm,
    "group": group_norm,
}
