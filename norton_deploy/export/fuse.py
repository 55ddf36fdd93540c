"""One pass over a model before export: CPDBlocks to the form they run in, BatchNorm into the convolutions."""

import copy
from itertools import pairwise
from typing import TypeVar

from torch import nn

from norton_deploy.errors import UserError
from norton_deploy.errors import UserError
from norton_deploy.export.lowering import Form, Norm, fold_norm, lower_block
from norton_deploy.modeling.cpd_block import CPDBlock

M = TypeVar("M", bound=nn.Module)


def lower_model(model: M, form: Form = "grouped", forms: Mapping[str, Form] | None = None) -> M:
    """A copy of `model` in which every CPDBlock has its running form and BatchNorm is folded away.

    Args:
        model: in eval mode; any module that holds its layers as torchvision does, a normalisation directly
            after the convolution whose output it takes: `convN`, `bnN` in a ResNet, neighbours in an
            `nn.Sequential`.
        form: how CPDBlocks leave, see `norton_deploy.export.lowering`.
        forms: CPDBlock name -> its own form, for those that shall not take `form` (see `export/tuning.py`).

    Returns:
        A copy with the same outputs to rounding; GroupNorm and other normalisations stay.

    Raises:
        UserError: the model is in training mode, where BatchNorm is no fixed affine map, or a BatchNorm keeps
            no statistics.
    """
    if model.training:
        raise UserError("lower_model: the model is in training mode; call .eval() first")
    lowered = copy.deepcopy(model)
    for parent in list(lowered.modules()):
        lower_children(parent, form)
    return lowered.eval()


def lower_children(parent: nn.Module, form: Form) -> None:
    """Replace, in place, the direct children of `parent` that are blocks or convolutions with a BatchNorm."""
    if isinstance(parent, CPDBlock):
        return
    children: list[tuple[str, nn.Module | None]] = [*parent.named_children(), ("", None)]
    for (name, layer), (next_name, next_layer) in pairwise(children):
        norm = next_layer if isinstance(next_layer, Norm) and follows(parent, name, next_name) else None
        if isinstance(layer, CPDBlock):
            setattr(parent, name, lower_block(layer, norm, forms[prefix + name]))
        elif isinstance(layer, nn.Conv2d) and norm is not None:
            setattr(parent, name, fold_norm(layer, norm))
        else:
            continue
        if norm is not None:
            setattr(parent, next_name, nn.Identity())


def follows(parent: nn.Module, name: str, next_name: str) -> bool:
    """Whether child `next_name` of `parent` is known to take the output of its neighbour `name`."""
    return isinstance(parent, nn.Sequential) or next_name == name.replace("conv", "bn")
