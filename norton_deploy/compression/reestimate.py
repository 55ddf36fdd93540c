"""BatchNorm re-estimation: new running statistics for changed weights, from a few forward passes."""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.compression.surgery import replace_submodule
from norton_deploy.errors import UserError
from norton_deploy.models.detectors import ModelSettings

BATCH = 16


@torch.no_grad()
def reestimate_batch_norm(model: nn.Module, images: Iterable[Tensor], settings: ModelSettings) -> int:
    """Replace the mean and variance of every BatchNorm by their averages over `images`, in place.

    Frozen BatchNorm is re-estimated too and stays frozen. Of a detector only the backbone runs: its heads have no
    BatchNorm.

    Args:
        model: classifier or detector.
        images: float [3, H, W], 0..1 RGB, of any sizes; they are taken 16 at a time.
        settings: of the model; they prepare the images.

    Returns:
        The number of images used.

    Raises:
        UserError: there are no images.
    """
    was_training = model.training
    model.eval()
    frozen = {name: layer for name, layer in model.named_modules() if isinstance(layer, FrozenBatchNorm2d)}
    for name, layer in frozen.items():
        replace_submodule(model, name, _thawed(layer))
    live = [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in live]
    for layer in live:
        layer.reset_running_stats()
        layer.momentum = None  # A plain average over all batches.
        layer.train()
    network = model.get_submodule("backbone") if is_detector(model) else model
    count = 0
    stream = iter(images)
    while batch := list(islice(stream, BATCH)):
        prepared = settings.prepare(batch)
        # The part that all images fill: the padding of the smaller ones would count as image.
        height, width = (min(sides) for sides in zip(*prepared.image_sizes, strict=True))
        network(prepared.tensors[:, :, :height, :width])
        count += len(batch)
    for layer, momentum in zip(live, momenta, strict=True):
        layer.momentum = momentum
    for name, layer in frozen.items():
        estimated = model.get_submodule(name)
        layer.running_mean.copy_(_tensor(estimated.running_mean))
        layer.running_var.copy_(_tensor(estimated.running_var))
        replace_submodule(model, name, layer)
    model.train(was_training)
    if count == 0:
        raise UserError("BatchNorm re-estimation: no images were given")
    return count


def _thawed(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    """A live BatchNorm with the affine terms of a frozen one."""
    live = nn.BatchNorm2d(len(frozen.weight), eps=frozen.eps)
    live.weight.copy_(_tensor(frozen.weight))
    live.bias.copy_(_tensor(frozen.bias))
    return live.to(_tensor(frozen.weight).device)


def _tensor(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value
