"""Every tensor of the small model comes from the large one, cut by hand here."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.resnet import resnet18
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.calibration import reestimate_batch_norm
from norton_deploy.compression.compress import (
    build_classifier,
    build_detector,
    channel_groups,
    compress,
    compress_with_kept,
)
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.errors import UserError
from norton_deploy.method.cp import decompose_filters
from norton_deploy.method.filter_selection import pabs_distance, select_filters
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task

TABLE3 = CompressionPlan.load(Path(__file__).parents[2] / "configs" / "plans" / "table3.yaml")
SMALL = DetectorSettings(
    num_classes=4,
    backbone=BackboneSettings("resnet50", fpn_channels=32),
    roi=RoiSettings(box_features=64, mask_channels=(32, 32), keypoint_channels=(32, 32)),
    image=ImageSettings(96, 96),
)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every normalisation its own statistics and affine terms, so that a lost one is seen."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d | FrozenBatchNorm2d):
            for name, low, high in (
                ("weight", 0.5, 1.5),
                ("bias", -0.2, 0.2),
                ("running_mean", -0.2, 0.2),
                ("running_var", 0.5, 1.5),
            ):
                tensor = getattr(layer, name)
                tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model.eval()


def stages(model: nn.Module, images: Tensor) -> list[Tensor]:
    """All outputs of a detector's dense stages on a fixed batch."""
    features = list(model.backbone(images).values())
    logits, deltas = model.rpn.head(features)
    heads = model.roi_heads
    boxes = [torch.tensor([[4.0, 4.0, 60.0, 50.0], [10.0, 20.0, 90.0, 90.0]])]
    maps = dict(zip(["0", "1", "2", "3"], features[:4], strict=True))
    sizes = [tuple(images.shape[-2:])]
    pooled = heads.box_roi_pool(maps, boxes, sizes)
    outputs = [*features, *logits, *deltas, *heads.box_predictor(heads.box_head(pooled))]
    if heads.has_mask():
        outputs.append(heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(maps, boxes, sizes))))
    if heads.has_keypoint():
        outputs.append(heads.keypoint_predictor(heads.keypoint_head(heads.keypoint_roi_pool(maps, boxes, sizes))))
    return outputs


@pytest.mark.parametrize("architecture", ["resnet50", "vgg16_bn"])
def test_an_empty_plan_is_exact(architecture: str) -> None:
    model = shake(ClassifierSettings(architecture, 10).build())
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = compress(model, CompressionPlan(architecture))
    torch.testing.assert_close(small(images), model(images), atol=1e-5, rtol=1e-5)


def test_full_rank_and_full_width_is_exact() -> None:
    model = shake(ClassifierSettings("resnet50", 10).build())
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    small = compress(model, CompressionPlan("resnet50", {"layer1.0.conv2": 9, "layer3.0.conv2": 9}))
    assert isinstance(small.get_submodule("layer3.0.conv2"), CPDBlock)
    torch.testing.assert_close(small(images), model(images), atol=1e-3, rtol=1e-4)


def test_pruning_only_equals_cutting_by_hand() -> None:
    """Cut conv1 of one block and the residual stream of stage 2, tensor by tensor."""
    model = shake(ClassifierSettings("resnet50", 10).build())
    plan = CompressionPlan("resnet50", {}, {"layer2.1.conv1": 100, "layer2": 300})
    small = compress(model, plan)

    free = select_filters(pabs_distance(model.layer2[1].conv1.weight.flatten(1)), 100)
    coupled = [model.layer2[0].downsample[0], *(block.conv3 for block in model.layer2)]
    stream = select_filters(sum(pabs_distance(conv.weight.flatten(1)) for conv in coupled), 300)

    state = model.state_dict()
    expected = dict(state)

    def cut(names: list[str], index: Tensor, dim: int = 0) -> None:
        for name in names:
            expected[name] = expected[name].index_select(dim, index)

    norm = ("weight", "bias", "running_mean", "running_var")
    cut(["layer2.1.conv1.weight", *(f"layer2.1.bn1.{part}" for part in norm)], free)
    cut(["layer2.1.conv2.weight"], free, dim=1)
    for block in range(4):
        cut([f"layer2.{block}.conv3.weight", *(f"layer2.{block}.bn3.{part}" for part in norm)], stream)
        if block:
            cut([f"layer2.{block}.conv1.weight"], stream, dim=1)
    cut(["layer2.0.downsample.0.weight", *(f"layer2.0.downsample.1.{part}" for part in norm)], stream)
    cut(["layer3.0.conv1.weight", "layer3.0.downsample.0.weight"], stream, dim=1)
    actual = small.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=0, rtol=0, msg=name)
    assert small(torch.rand(1, 3, 64, 64)).shape == (1, 10)


def test_what_pruning_leaves_is_decomposed_where_the_plan_says_prune_first() -> None:
    layer, reader = "layer1.0.conv1", "layer1.0.conv2"
    model = shake(ClassifierSettings("resnet18", 10).build())
    plan = CompressionPlan("resnet18", {layer: 2, reader: 2}, {layer: 24})
    usual, first = (compress_with_kept(model, replace(plan, first=order), starts=1) for order in ("decompose", "prune"))
    assert usual.kept.keys() == first.kept.keys() == {layer}
    kept = first.kept[layer]
    assert torch.equal(usual.kept[layer], kept)
    wanted = model.get_submodule(reader).weight.detach()[:, kept]  # type: ignore[index]
    errors = []
    for small in (usual.model, first.model):
        block = small.get_submodule(reader)
        assert isinstance(block, CPDBlock)
        errors.append(float((block.dense_weight().detach() - wanted).square().sum()))
    assert errors[1] < errors[0]
    expected = decompose_filters(wanted, 2, starts=1).reconstruct()
    torch.testing.assert_close(block.dense_weight(), expected)
    told: list[tuple[str, int]] = []
    known = compress_with_kept(
        model,
        replace(plan, first="prune"),
        starts=1,
        chosen={layer: kept},
        progress=lambda name, all: told.append((name, all)),
    )
    assert told == [(layer, 2), (reader, 2)]  # each once
    torch.testing.assert_close(known.model.state_dict(), first.model.state_dict())
    with pytest.raises(UserError, match=f"layer '{reader}'.*ranks"):
        compress(model, CompressionPlan("resnet18", {}, {layer: 24}, tucker={reader: (32, 32)}, first="prune"))


def zero_out(model: nn.Module, kept: dict[str, Tensor]) -> nn.Module:
    """The dense model with the pruned channels silenced: what a cut must compute."""
    silent = copy.deepcopy(model)
    for name, index in kept.items():
        group = channel_groups(model)[name]
        width = channel_groups_width(model, name)
        gone = torch.ones(width, dtype=torch.bool)
        gone[index] = False
        for reader in group.readers:
            layer = silent.get_submodule(reader.layer)
            columns = gone.repeat_interleave(reader.columns)
            if isinstance(layer, nn.ConvTranspose2d):
                layer.weight.data[columns] = 0
            else:
                layer.weight.data[:, columns] = 0
    return silent


def channel_groups_width(model: nn.Module, name: str) -> int:
    layer = model.get_submodule(channel_groups(model)[name].producers[0])
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_pruning_a_whole_detector_silences_exactly_the_cut_channels(task: Task) -> None:
    torch.manual_seed(1)
    model = shake(SMALL.build(task))
    keep = {}
    for name in channel_groups(model):
        width = channel_groups_width(model, name)
        keep[name] = max(1, int(width * 0.7))
    small = compress(model, CompressionPlan("rcnn", {}, keep))

    kept = {}
    for name, group in channel_groups(model).items():
        layers = [model.get_submodule(producer) for producer in group.producers]
        rows = [
            (layer.weight.transpose(0, 1) if isinstance(layer, nn.ConvTranspose2d) else layer.weight).detach()
            for layer in layers
        ]
        kept[name] = select_filters(sum(pabs_distance(row.flatten(1)) for row in rows), keep[name])
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        actual, expected = stages(small, images), stages(zero_out(model, kept), images)
    pyramid = kept["backbone.fpn.layer_blocks"]
    for index, (small_output, large_output) in enumerate(zip(actual, expected, strict=True)):
        if index < 5:  # The pyramid levels lose channels themselves.
            large_output = large_output[:, pyramid]
        torch.testing.assert_close(small_output, large_output, atol=2e-4, rtol=1e-3)


def test_an_empty_plan_of_a_detector_is_exact() -> None:
    torch.manual_seed(2)
    model = shake(SMALL.build("mask"))
    images = torch.rand(1, 3, 96, 96)
    with torch.no_grad():
        for small, large in zip(
            stages(compress(model, CompressionPlan("rcnn")), images), stages(model, images), strict=True
        ):
            torch.testing.assert_close(small, large, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
def test_a_backbone_plan_fits_the_backbone_in_a_detector(norm: str) -> None:
    model = replace(SMALL, backbone=replace(SMALL.backbone, norm=norm)).build("box")
    small = compress(model, TABLE3, starts=1)
    block = small.get_submodule("backbone.body.layer4.2.conv2")
    assert isinstance(block, CPDBlock)
    assert (block.in_channels, block.out_channels, block.rank) == (128, 128, 1)
    torch.manual_seed(0)
    detections = small.eval()([torch.rand(3, 96, 96)])
    assert detections[0]["boxes"].shape[1] == 4


def test_frozen_stages_stay_frozen() -> None:
    model = compress(
        replace(SMALL, backbone=replace(SMALL.backbone, trainable_layers=2)).build("box"),
        TABLE3,
        starts=1,
    )
    trained = {name for name, parameter in model.backbone.body.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(name.startswith(("layer3", "layer4")) for name in trained)


def test_a_detector_plan_gives_its_body_to_a_classifier() -> None:
    plan = CompressionPlan(
        "rcnn",
        {"backbone.body.layer1.0.conv2": 1, "backbone.fpn.layer_blocks.0.0": 1, "roi_heads.mask_head.0.0": 1},
        {"backbone.body.layer2": 64},
    )
    model = build_classifier(ClassifierSettings("resnet50", 5), plan)
    assert isinstance(model.get_submodule("layer1.0.conv2"), CPDBlock)
    assert model.get_submodule("layer2.0.conv3").out_channels == 64
    boxes = build_detector("box", SMALL, plan)
    assert isinstance(boxes.get_submodule("backbone.fpn.layer_blocks.0.0"), CPDBlock)


def test_resnet18_without_first_downsampling_couples_stem_and_stage_one() -> None:
    model = shake(resnet18(weights=None, num_classes=5))
    groups = channel_groups(model)
    assert groups["conv1"].producers == ("conv1", "layer1.0.conv2", "layer1.1.conv2")
    small = compress(model, CompressionPlan("resnet18", {}, {"conv1": 40, "layer1.0.conv1": 30, "layer3": 200}))
    assert small(torch.rand(2, 3, 64, 64)).shape == (2, 5)


def test_compressing_twice_is_refused() -> None:
    model = build_classifier(ClassifierSettings("resnet50", 5), CompressionPlan("resnet50", {"layer1.0.conv2": 1}))
    with pytest.raises(UserError, match=r"layer1\.0\.conv2.*already decomposed"):
        compress(model, CompressionPlan("resnet50", {"layer1.0.conv2": 1}))


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_reestimation_gives_the_statistics_of_the_images(norm: str) -> None:
    model = shake(replace(SMALL, backbone=replace(SMALL.backbone, norm=norm)).build("box"))
    images = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    assert reestimate_batch_norm(model, images, SMALL) == 4
    stem = model.backbone.body.conv1(model.transform(images)[0].tensors)
    torch.testing.assert_close(model.backbone.body.bn1.running_mean, stem.mean(dim=(0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        model.backbone.body.bn1.running_var, stem.var(dim=(0, 2, 3), unbiased=True), atol=1e-5, rtol=1e-4
    )
    assert isinstance(model.backbone.body.bn1, FrozenBatchNorm2d) == (norm == "frozen")
    with pytest.raises(UserError, match="no images"):
        reestimate_batch_norm(model, [], SMALL)


def test_statistics_weigh_images_not_batches() -> None:
    model = shake(SMALL.build("box"))
    images = [torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(i)) * (i > 15) for i in range(18)]
    reestimate_batch_norm(model, images, SMALL)  # sixteen black images, then two bright ones
    stem = model.backbone.body.conv1(model.transform(images)[0].tensors)
    torch.testing.assert_close(model.backbone.body.bn1.running_mean, stem.mean(dim=(0, 2, 3)), atol=1e-4, rtol=1e-3)


def test_statistics_know_nothing_of_padding() -> None:
    """The first normalisation sees the convolved part that both images fill."""
    model = replace(SMALL, backbone=replace(SMALL.backbone, norm="batch")).build("box")
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 64)]
    reestimate_batch_norm(model, images, SMALL)
    prepared = model.transform(images)[0]
    (height, width), (other_height, other_width) = prepared.image_sizes
    common = prepared.tensors[:, :, : min(height, other_height), : min(width, other_width)]
    body = model.backbone.body
    with torch.no_grad():
        expected = body.conv1(common).mean(dim=(0, 2, 3))
    assert (height, width) != (other_height, other_width)
    torch.testing.assert_close(body.bn1.running_mean, expected)
