"""Which layers share a channel axis, who writes it, normalises it and reads it; and cutting channels out of them.

A filter can only be pruned everywhere at once. The convolutions whose outputs are added together (the
last convolutions and the downsampling of a residual stage, the lateral convolutions of a feature pyramid)
therefore form one group with one set of kept filters, and every layer that reads those channels loses the
same input channels. The small layer's numbers are the large layer's, nothing else.
"""

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.factored_conv import Decomposed, FactoredConv
from norton_deploy.method.filter_selection import Filters
from norton_deploy.models.classifiers import GROUPS

NORMS = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, nn.GroupNorm)
PYRAMID_GROUP = "backbone.fpn.layer_blocks"
"""The channels of a detector's feature pyramid, which the RPN and all RoI heads read."""


@dataclass(frozen=True)
class Reader:
    """A layer that reads a group's channels; `columns` input features stand for each channel.

    `columns` is 1 for a convolution and height x width for a linear layer behind a flattened map.
    """

    layer: str
    columns: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """One channel axis of a model.

    Attributes:
        name: the producing layer's name, or for coupled layers the stage's name.
        producers: layers whose filters write the channels (their outputs are added, or serve the same
            shared head, when there are several).
        norms: normalisation layers on the channels.
        readers: layers whose inputs are the channels.
    """

    name: str
    producers: tuple[str, ...]
    norms: tuple[str, ...]
    readers: tuple[Reader, ...]


def is_detector(model: nn.Module) -> bool:
    """Whether `model` is a two-stage detector rather than a classifier."""
    return hasattr(model, "roi_heads")


def channel_groups(model: nn.Module) -> dict[str, ChannelGroup]:
    """All prunable channel groups of a detector or classifier, by name."""
    groups = detector_groups(model) if is_detector(model) else classifier_groups(model)
    return {group.name: group for group in groups}


def resnet_groups(
    body: nn.Module, prefix: str = "", stage_readers: dict[str, tuple[Reader, ...]] | None = None
) -> Iterator[ChannelGroup]:
    """Channel groups of a torchvision ResNet (bottleneck or basic blocks).

    conv1 and conv2 of a bottleneck are free; the last convolutions and the downsampling of a stage share
    the residual stream, which is one group named after the stage. A stage without downsampling (the first
    of ResNet-18 and -34) goes on in the stream before it.

    Args:
        body: module with conv1, bn1, layer1..layer4.
        prefix: put before every name, for example "backbone.body.".
        stage_readers: stage name -> layers outside the body that read that stage's output.
    """
    outside = stage_readers or {}
    stream_name, producers, norms = "conv1", ["conv1"], ["bn1"]
    readers: list[Reader] = []
    inner_groups: list[ChannelGroup] = []

    def stream() -> ChannelGroup:
        return ChannelGroup(
            prefix + stream_name,
            tuple(prefix + name for name in producers),
            tuple(prefix + name for name in norms),
            tuple(readers),
        )

    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for index, block in enumerate(body.get_submodule(stage).children()):
            name = f"{stage}.{index}"
            if isinstance(block, Bottleneck):
                chain, last = ["conv1", "conv2"], ("conv3", "bn3")
            elif isinstance(block, BasicBlock):
                chain, last = ["conv1"], ("conv2", "bn2")
            else:
                raise TypeError(f"{prefix}{name}: expected a torchvision ResNet block, found {type(block)}")
            for position, conv in enumerate(chain):
                following = chain[position + 1] if position + 1 < len(chain) else last[0]
                inner_groups.append(
                    ChannelGroup(
                        f"{prefix}{name}.{conv}",
                        (f"{prefix}{name}.{conv}",),
                        (f"{prefix}{name}.{conv.replace('conv', 'bn')}",),
                        (Reader(f"{prefix}{name}.{following}"),),
                    )
                )
            readers.append(Reader(f"{prefix}{name}.{chain[0]}"))
            if block.downsample is not None:
                readers.append(Reader(f"{prefix}{name}.downsample.0"))
                yield stream()
                stream_name = stage
                producers, norms, readers = [f"{name}.downsample.0"], [f"{name}.downsample.1"], []
            producers.append(f"{name}.{last[0]}")
            norms.append(f"{name}.{last[1]}")
        readers.extend(outside.get(stage, ()))
        yield from inner_groups
        inner_groups.clear()
    yield stream()


def chain_groups(layers: Sequence[str], norms: Mapping[str, str] | None = None) -> Iterator[ChannelGroup]:
    """Groups of a plain chain of layers, in the order of the data; the last one is not pruned.

    Args:
        norms: layer -> its normalisation, for those that have one.
    """
    for layer, following in itertools.pairwise(layers):
        norm = (norms or {}).get(layer)
        yield ChannelGroup(layer, (layer,), () if norm is None else (norm,), (Reader(following),))


def classifier_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """Channel groups of a classifier: a ResNet, or a VGG with `features` and `classifier`."""
    if hasattr(model, "layer4"):
        return tuple(resnet_groups(model, stage_readers={"layer4": (Reader("fc"),)}))
    layers: list[str] = []
    norms: dict[str, str] = {}
    for part in ("features", "classifier"):
        for index, layer in model.get_submodule(part).named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear | Decomposed):
                layers.append(f"{part}.{index}")
            elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
                norms[layers[-1]] = f"{part}.{index}"
    return tuple(chain_groups(layers, norms))


def detector_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """Channel groups of a whole torchvision two-stage detector with a ResNet-FPN backbone.

    The lateral convolutions of the pyramid are one group, its output convolutions another: all levels
    keep the same channels, because the RPN head and both RoI heads are shared between the levels.
    """
    fpn = model.get_submodule("backbone.fpn")
    levels = len(list(fpn.get_submodule("inner_blocks").children()))
    stages = ["layer1", "layer2", "layer3", "layer4"][-levels:]
    inner = [f"backbone.fpn.inner_blocks.{level}.0" for level in range(levels)]
    outer = [f"{PYRAMID_GROUP}.{level}.0" for level in range(levels)]
    groups = list(
        resnet_groups(
            model.get_submodule("backbone.body"),
            "backbone.body.",
            {stage: (Reader(layer),) for stage, layer in zip(stages, inner, strict=True)},
        )
    )
    groups.append(ChannelGroup("backbone.fpn.inner_blocks", tuple(inner), (), tuple(Reader(layer) for layer in outer)))
    pooled = [name for name in ("box_head.fc6", "mask_head.0.0", "keypoint_head.0") if _has(model, name)]
    box_pool = cast(MultiScaleRoIAlign, model.get_submodule("roi_heads.box_roi_pool"))
    height, width = box_pool.output_size
    pyramid_readers = [Reader("rpn.head.conv.0.0")]
    for name in pooled:
        pyramid_readers.append(Reader(f"roi_heads.{name}", height * width if name.endswith("fc6") else 1))
    groups.append(ChannelGroup(PYRAMID_GROUP, tuple(outer), (), tuple(pyramid_readers)))
    groups.extend(_head_groups(model))
    return tuple(groups)


def _has(model: nn.Module, name: str) -> bool:
    return any(found == f"roi_heads.{name}" for found, _ in model.named_modules())


def _head_groups(model: nn.Module) -> Iterator[ChannelGroup]:
    """Groups inside the RPN head, the box head and the mask or keypoint head.

    The rows of fc6 and fc7 are filters: pruning makes these layers small, so they are not factorised as well.
    """
    chain = [f"rpn.head.conv.{index}.0" for index, _ in model.get_submodule("rpn.head.conv").named_children()]
    yield from chain_groups(chain)
    yield ChannelGroup(chain[-1], (chain[-1],), (), (Reader("rpn.head.cls_logits"), Reader("rpn.head.bbox_pred")))
    heads = "roi_heads."
    fc6, fc7, predictor = f"{heads}box_head.fc6", f"{heads}box_head.fc7", f"{heads}box_predictor"
    yield from chain_groups((fc6, fc7))
    yield ChannelGroup(fc7, (fc7,), (), (Reader(f"{predictor}.cls_score"), Reader(f"{predictor}.bbox_pred")))
    if _has(model, "mask_head"):
        layers = model.get_submodule(f"{heads}mask_head").named_children()
        convs = [f"{heads}mask_head.{index}.0" for index, _ in layers]
        yield from chain_groups([*convs, f"{heads}mask_predictor.conv5_mask", f"{heads}mask_predictor.mask_fcn_logits"])
    if _has(model, "keypoint_head"):
        layers = model.get_submodule(f"{heads}keypoint_head").named_children()
        convs = [f"{heads}keypoint_head.{index}" for index, layer in layers if not isinstance(layer, nn.ReLU)]
        yield from chain_groups([*convs, f"{heads}keypoint_predictor.kps_score_lowres"])


def output_width(layer: nn.Module) -> int:
    """Number of filters of a convolution, linear layer or decomposed layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return int(cast(nn.Conv2d, layer).out_channels)


def filters_of(layer: nn.Module) -> Filters:
    """What a choice of filters compares: a CPDBlock's factors, of any other layer the filters as vectors [O, F]."""
    if isinstance(layer, CPDBlock):
        return layer.factors()
    if isinstance(layer, FactoredConv):
        return layer.dense_weight().detach().flatten(1)
    weight = cast(Tensor, layer.weight)
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    return weight.detach().flatten(1)


def cut_outputs(layer: nn.Module, kept: Tensor) -> nn.Module:
    """A copy of `layer` with only the filters (or normalised channels) `kept` [O'] (int64).

    Raises:
        TypeError: a layer of another kind, or a grouped convolution.
    """
    if isinstance(layer, Decomposed):
        return layer.select_filters(kept)
    small = copy.deepcopy(layer)
    if isinstance(small, NORMS):
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
        layer: convolution, transposed convolution, linear layer or decomposed layer.
        kept: kept channels, ascending.
        columns: input features of a linear layer per channel (height x width of a flattened map,
            channels first).

    Raises:
        TypeError: a layer of another kind, or a grouped convolution.
    """
    if isinstance(layer, Decomposed):
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
