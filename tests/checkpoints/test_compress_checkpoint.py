"""From a dense checkpoint to a compressed one, the digest of tensors, complexity at a model's own size."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from norton_deploy.checkpoints.checkpoint import (
    Checkpoint,
    CheckpointHeader,
    class_categories,
    save_checkpoint,
    tensors_digest,
)
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.compression.calibration import make_probes, reestimate_batch_norm
from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.compression.channel_harm import choose_by_harm
from norton_deploy.compression.compress import compress, compress_with_kept
from norton_deploy.compression.refit import refit
from norton_deploy.cost.complexity import complexity_of, count_complexity
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories

SETTINGS = ClassifierSettings("resnet18", 3, image_size=(32, 32))
BLOCKS = [f"layer{stage}.{block}.conv1" for stage in range(1, 5) for block in range(2)]
# So narrow that each layer's refit is a small system.
PLAN = CompressionPlan(
    "resnet18", {"layer1.0.conv1": 2}, dict.fromkeys([*BLOCKS, "conv1", "layer2", "layer3", "layer4"], 8)
)


@pytest.fixture(scope="module")
def dense() -> Checkpoint:
    torch.manual_seed(0)
    header = CheckpointHeader("cls", SETTINGS, None, class_categories("abc"))
    return Checkpoint(SETTINGS.build().eval(), header)


def images(count: int = 4) -> list[Tensor]:
    return [torch.rand(3, 40, 36, generator=torch.Generator().manual_seed(seed)) for seed in range(count)]


def test_filters_are_chosen_by_harm_on_the_images_of_the_refit(dense: Checkpoint) -> None:
    with pytest.raises(UserError, match="by harm on the images of the refit"):
        compress_checkpoint(dense, PLAN, command="", choose="harm", starts=1)
    probes = list(make_probes(dense.model, images(), SETTINGS))
    chosen = choose_by_harm(dense.model, PLAN, probes)
    by_hand = compress_with_kept(dense.model, PLAN, starts=1, chosen=chosen)
    refit(by_hand.model, dense.model, by_hand.kept, probes)
    plan = replace(PLAN, choose="harm")
    with pytest.raises(UserError, match="--choose angles"):
        compress_checkpoint(dense, plan, command="", starts=1)
    found = compress_checkpoint(dense, plan, command="", starts=1, refit_images=images())
    assert found.header.plan == plan
    assert tensors_digest(found.model.state_dict()) == tensors_digest(by_hand.model.state_dict())


def test_it_compresses_refits_reestimates_and_writes_its_lineage(dense: Checkpoint, tmp_path: Path) -> None:
    source = tmp_path / "dense.safetensors"
    save_checkpoint(source, dense.model, dense.header)
    calls: list[tuple[str, str, int]] = []
    found = compress_checkpoint(
        dense,
        PLAN,
        command="tools/compress.py",
        source=source,
        starts=1,
        refit_images=images(),
        reestimate_images=iter(images()),
        progress=lambda *call: calls.append(call),
    )
    by_hand = compress_with_kept(dense.model, PLAN, starts=1)
    refit(by_hand.model, dense.model, by_hand.kept, list(make_probes(dense.model, images(), SETTINGS)))
    reestimate_batch_norm(by_hand.model, images(), SETTINGS)
    assert tensors_digest(found.model.state_dict()) == tensors_digest(by_hand.model.state_dict())
    assert found.header.plan == PLAN and found.header.pyramid_channels is None
    (entry,) = found.header.lineage
    assert (entry["command"], entry["source"], len(entry["source_sha256"])) == ("tools/compress.py", str(source), 64)
    assert [call for call in calls if call[0] == "compress"] == [
        ("compress", name, 13) for name in ("layer1.0.conv1", *PLAN.keep)
    ]
    layers = [layer for stage, layer, _ in calls if stage == "refit"]
    assert len(set(layers)) == len(layers) and {count for stage, _, count in calls if stage == "refit"} == {len(layers)}


def test_without_images_it_only_compresses_and_is_refused_twice(dense: Checkpoint) -> None:
    found = compress_checkpoint(dense, PLAN, command="x", starts=1)
    small = compress(dense.model, PLAN, starts=1)
    assert tensors_digest(found.model.state_dict()) == tensors_digest(small.state_dict())
    with pytest.raises(UserError, match="the model: is compressed already"):
        compress_checkpoint(found, PLAN, command="x")
    with pytest.raises(UserError, match="plan: a plan for vgg16_bn, and the model is a resnet18"):
        compress_checkpoint(dense, replace(PLAN, architecture="vgg16_bn"), command="x")


def test_a_narrowed_pyramid_names_its_channels() -> None:
    settings = DetectorSettings(
        num_classes=2, backbone=BackboneSettings("resnet18", fpn_channels=16), roi=RoiSettings(box_features=32)
    )
    header = CheckpointHeader("box", settings, None, Categories((1,), (1,), ("thing",)))
    dense = Checkpoint(settings.build("box").eval(), header)
    plan = CompressionPlan("rcnn", {}, {PYRAMID_GROUP: 6})
    channels = compress_checkpoint(dense, plan, command="x").header.pyramid_channels
    assert channels == tuple(compress_with_kept(dense.model, plan).kept[PYRAMID_GROUP].tolist())


def test_complexity_is_counted_at_the_models_own_size(dense: Checkpoint) -> None:
    assert complexity_of(dense.model, SETTINGS) == count_complexity(dense.model, (32, 32))
    settings = DetectorSettings(
        num_classes=2,
        backbone=BackboneSettings("resnet18", fpn_channels=16),
        roi=RoiSettings(box_features=32),
        image=ImageSettings(min_size=64),
    )
    model = settings.build("box")
    found = complexity_of(model, settings)
    assert (found.image_size, found.proposals, found.detections) == ((64, 64), 1000, 0)
    assert found == count_complexity(model, (64, 64), proposals=1000)


def test_the_digest_covers_names_types_shapes_and_bytes() -> None:
    tensors = {"b": torch.arange(6, dtype=torch.float32), "a": torch.tensor(3)}
    # Written down, because files hold it.
    assert tensors_digest(tensors) == "d4a2eba4b8ec923c343a49d952062a4e98c90d1a02d6818f8e81b083a6a4c8aa"
    assert tensors_digest(dict(reversed(tensors.items()))) == tensors_digest(tensors)
    others = [
        {"c": tensors["b"], "a": tensors["a"]},
        {"b": tensors["b"].view(torch.int32), "a": tensors["a"]},
        {"b": tensors["b"].view(2, 3), "a": tensors["a"]},
        {"b": tensors["b"] + 1, "a": tensors["a"]},
    ]
    assert len({tensors_digest(tensors), tensors_digest(tensors, b"x"), *map(tensors_digest, others)}) == 6
