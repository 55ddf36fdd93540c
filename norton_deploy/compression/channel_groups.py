"""Which layers share a channel axis: who writes it, who normalises it, who reads it.

A filter can only be pruned everywhere at once. The convolutions whose outputs are added together (the
last convolutions and the downsampling of a residual stage, the lateral convolutions of a feature pyramid)
therefore form one group with one set of kept filters, and every layer that reads those channels loses the
same input channels.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import MultiScaleRoIAlign

from norton_deploy.compression.cpd_block import CPDBlock

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


def sequential_groups(
    model: nn.Module, layers: list[tuple[str, str | None]], columns: dict[str, int]
) -> Iterator[ChannelGroup]:
    """Groups of a plain chain of layers, each given with its normalisation; the last one is not pruned.

    Args:
        model: only used to check that the layers exist.
        layers: (layer name, name of its normalisation or None), in the order of the data.
        columns: layer name -> input features per channel of the layer before, where it is not 1.
    """
    for (layer, norm), (following, _) in itertools.pairwise(layers):
        model.get_submodule(layer)
        yield ChannelGroup(
            layer, (layer,), () if norm is None else (norm,), (Reader(following, columns.get(following, 1)),)
        )


def classifier_groups(model: nn.Module) -> tuple[ChannelGroup, ...]:
    """Channel groups of a classifier: a ResNet, or a VGG with `features` and `classifier`."""
    if hasattr(model, "layer4"):
        return tuple(resnet_groups(model, stage_readers={"layer4": (Reader("fc"),)}))
    layers: list[tuple[str, str | None]] = []
    for part in ("features", "classifier"):
        for index, layer in model.get_submodule(part).named_children():
            if isinstance(layer, nn.Conv2d | nn.Linear | CPDBlock):
                layers.append((f"{part}.{index}", None))
            elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
                layers[-1] = (layers[-1][0], f"{part}.{index}")
    return tuple(sequential_groups(model, layers, columns={}))


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
    try:
        model.get_submodule(f"roi_heads.{name}")
    except AttributeError:
        return False
    return True


def _head_groups(model: nn.Module) -> Iterator[ChannelGroup]:
    """Groups inside the RPN head, the box head and the mask or keypoint head.

    The rows of fc6 and fc7 are filters: pruning makes these layers small, so they are not factorised as well.
    """
    chain = [f"rpn.head.conv.{index}.0" for index, _ in model.get_submodule("rpn.head.conv").named_children()]
    for layer, following in itertools.pairwise(chain):
        yield ChannelGroup(layer, (layer,), (), (Reader(following),))
    yield ChannelGroup(chain[-1], (chain[-1],), (), (Reader("rpn.head.cls_logits"), Reader("rpn.head.bbox_pred")))
    heads = "roi_heads."
    yield ChannelGroup(f"{heads}box_head.fc6", (f"{heads}box_head.fc6",), (), (Reader(f"{heads}box_head.fc7"),))
    yield ChannelGroup(
        f"{heads}box_head.fc7",
        (f"{heads}box_head.fc7",),
        (),
        (Reader(f"{heads}box_predictor.cls_score"), Reader(f"{heads}box_predictor.bbox_pred")),
    )
    if _has(model, "mask_head"):
        head = model.get_submodule(f"{heads}mask_head")
        convs = [f"{heads}mask_head.{index}.0" for index, _ in head.named_children()]
        predictor = f"{heads}mask_predictor"
        chain = [*convs, f"{predictor}.conv5_mask", f"{predictor}.mask_fcn_logits"]
    elif _has(model, "keypoint_head"):
        head = model.get_submodule(f"{heads}keypoint_head")
        convs = [
            f"{heads}keypoint_head.{index}" for index, layer in head.named_children() if not isinstance(layer, nn.ReLU)
        ]
        chain = [*convs, f"{heads}keypoint_predictor.kps_score_lowres"]
    else:
        return
    for layer, following in itertools.pairwise(chain):
        yield ChannelGroup(layer, (layer,), (), (Reader(following),))
