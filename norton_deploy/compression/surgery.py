"""Cutting channels out of single layers: the small layer's numbers are the large layer's, nothing else."""

import copy
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.models.classifiers import GROUPS

_NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, nn.GroupNorm)


def replace_submodule(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the submodule `name` ("backbone.body.conv1")."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, layer)


def output_width(layer: nn.Module) -> int:
    """Number of filters of a convolution, linear layer or CPDBlock."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(cast(nn.Conv2d | CPDBlock, layer).out_channels)


def filter_rows(layer: nn.Module) -> Tensor:
    """The filters of a plain layer as vectors [O, ...flattened]: what the angles of 1x1 filters compare."""
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    return weight.detach().flatten(1)


def cut_outputs(layer: nn.Module, kept: Tensor) -> nn.Module:
    """A copy of `layer` with only the filters (or normalised channels) `kept` [O'] (int64).

    Raises:
        TypeError: a layer of another kind, or a grouped convolution.
    """
    if isinstance(layer, CPDBlock):
        return layer.select_filters(kept)
    small = copy.deepcopy(layer)
    if isinstance(small, _NORMS):
        for name in ("weight", "bias", "running_mean", "running_var"):
            _take(small, name, kept, dim=0)
        if isinstance(small, nn.GroupNorm):
            small.num_channels = len(kept)
            small.num_groups = int(torch.gcd(torch.tensor(GROUPS), torch.tensor(len(kept))))
        elif isinstance(small, nn.modules.batchnorm._BatchNorm):
            small.num_features = len(kept)
        return small
    _require_plain(layer)
    _take(small, "weight", kept, dim=1 if isinstance(small, nn.ConvTranspose2d) else 0)
    _take(small, "bias", kept, dim=0)
    if isinstance(small, nn.Linear):
        small.out_features = len(kept)
    else:
        cast(nn.Conv2d | nn.ConvTranspose2d, small).out_channels = len(kept)
    return small


def cut_inputs(layer: nn.Module, kept: Tensor, columns: int = 1) -> nn.Module:
    """A copy of `layer` that reads only the input channels `kept` [I'] (int64).

    Args:
        layer: convolution, transposed convolution, linear layer or CPDBlock.
        kept: kept channels, ascending.
        columns: input features of a linear layer per channel (height x width of a flattened map,
            channels first).

    Raises:
        TypeError: a layer of another kind, or a grouped convolution.
    """
    if isinstance(layer, CPDBlock):
        return layer.select_inputs(kept)
    _require_plain(layer)
    small = copy.deepcopy(layer)
    if isinstance(small, nn.Linear):
        features = (kept[:, None] * columns + torch.arange(columns)[None, :]).flatten()
        _take(small, "weight", features, dim=1)
        small.in_features = len(features)
    else:
        _take(small, "weight", kept, dim=0 if isinstance(small, nn.ConvTranspose2d) else 1)
        cast(nn.Conv2d | nn.ConvTranspose2d, small).in_channels = len(kept)
    return small


def _require_plain(layer: nn.Module) -> None:
    if isinstance(layer, nn.Linear):
        return
    if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d) or layer.groups != 1:
        raise TypeError(f"cannot cut channels out of {layer}; expected an ungrouped convolution or a linear layer")


def _take(layer: nn.Module, name: str, index: Tensor, dim: int) -> None:
    """Replace one tensor of `layer` by its entries `index` along `dim`; absent tensors stay absent."""
    tensor = getattr(layer, name, None)
    if tensor is None:
        return
    part = tensor.detach().index_select(dim, index.to(tensor.device)).clone()
    if isinstance(tensor, nn.Parameter):
        setattr(layer, name, nn.Parameter(part, requires_grad=tensor.requires_grad))
    else:
        layer.register_buffer(name, part)
