"""An exponential moving average of a model's weights."""

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def build_weight_average(model: nn.Module, decay: float) -> AveragedModel:
    """A running copy of `model`: w <- d w + (1 - d) w_model after every step, buffers included.

    The decay d rises as (1 + n) / (10 + n) over the first n updates up to `decay`; a constant one would keep
    the first, untrained weights in the average for 1 / (1 - decay) steps. Whole-number buffers are copied.
    """

    def average(averaged: Tensor, current: Tensor, updates: Tensor | int) -> Tensor:
        if not averaged.is_floating_point():
            return current
        count = int(updates)
        return averaged.lerp(current, 1 - min(decay, (1 + count) / (10 + count)))

    return AveragedModel(model, avg_fn=average, use_buffers=True)
