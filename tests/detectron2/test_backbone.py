"""The registered backbone in the real Detectron2."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from seeded import HERE, seeded_image

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.compression.compress import compress
from norton_deploy.detectron2.checkpoint import import_detectron2
from norton_deploy.errors import UserError
from norton_deploy.inference.torch_backend import TorchPredictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Categories

# Detectron2 is no dependency: it is built from source by those who train in it (docs/detectron2.md).
pytest.importorskip("detectron2")

import norton_deploy.detectron2.registry as registered

PLAN = CompressionPlan(
    "rcnn",
    {"backbone.body.layer4.0.conv2": 1, "rpn.head.conv.0.0": 1},
    {"backbone.body.layer3": 512, "backbone.fpn.layer_blocks": 96, "roi_heads.box_head.fc6": 64},
)
PIXELS = {"PIXEL_MEAN": [123.675, 116.28, 103.53], "PIXEL_STD": [58.395, 57.12, 57.375]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A detector that is compressed in its backbone and, which must not matter, in its heads."""
    settings = DetectorSettings(
        num_classes=3, roi=RoiSettings(box_features=64), backbone=BackboneSettings(norm="batch")
    )
    torch.manual_seed(0)
    model = compress(settings.build("box"), PLAN, starts=1).eval()
    path = tmp_path_factory.mktemp("norton") / "small.safetensors"
    categories = Categories((1, 2), (1, 2), ("a", "b"))
    save_checkpoint(path, model, CheckpointHeader("box", settings, PLAN, categories))
    return path


def write_config(path: Path, weights: Path, model: dict, fmt: str = "RGB") -> Path:
    sections = {
        "BACKBONE": {"NAME": "build_norton_resnet_fpn_backbone", "FREEZE_AT": 2},
        "RESNETS": {"NORM": "BN"},
        "NORTON": {"WEIGHTS": str(weights)},
        "ROI_HEADS": {"NUM_CLASSES": 2, "SCORE_THRESH_TEST": 0.01},
    }
    base = str(HERE / "configs" / "base.yaml")
    path.write_text(yaml.safe_dump({"_BASE_": base, "MODEL": sections | model, "INPUT": {"FORMAT": fmt}}))
    return path


@pytest.mark.parametrize("fmt", ["RGB", "BGR"])
def test_backbone_trains_and_comes_back(tmp_path: Path, checkpoint: Path, fmt: str) -> None:
    from detectron2.config import get_cfg
    from detectron2.engine import DefaultPredictor
    from detectron2.structures import Boxes, Instances

    pixels = {name: values[:: -1 if fmt == "BGR" else 1] for name, values in PIXELS.items()}
    config = get_cfg()
    config.merge_from_file(str(write_config(tmp_path / "c.yaml", checkpoint, pixels, fmt)))
    torch.manual_seed(1)
    predictor = DefaultPredictor(config)
    model, backbone = predictor.model, predictor.model.backbone
    assert isinstance(backbone, registered.NortonBackbone)
    assert {name: (shape.channels, shape.stride) for name, shape in backbone.output_shape().items()} == {
        f"p{level}": (96, 2**level) for level in range(2, 7)
    }
    trained = {name.split(".")[1] for name, p in backbone.named_parameters() if p.requires_grad and "body" in name}
    assert trained == {"layer2", "layer3", "layer4"}
    before = backbone.body.layer1[0].bn1.running_mean.clone()

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    target = Instances((160, 224))
    target.gt_boxes, target.gt_classes = Boxes(torch.tensor([[20.0, 30.0, 90.0, 120.0]])), torch.tensor([1])
    image = torch.from_numpy(seeded_image((160, 224), seed=0).copy()).permute(2, 0, 1)
    model.train()
    from detectron2.utils.events import EventStorage

    with EventStorage():
        losses = model([{"image": image, "instances": target}])
    sum(losses.values()).backward()
    optimizer.step()
    model.eval()
    assert torch.equal(backbone.body.layer1[0].bn1.running_mean, before)  # frozen parts keep their statistics
    weights = tmp_path / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 1}, weights)

    dumped = tmp_path / "config.yaml"
    dumped.write_text(config.dump())  # what Detectron2's trainer writes beside the weights
    imported = import_detectron2(dumped, weights)
    plan = imported.header.plan
    assert plan is not None and dict(plan.ranks) == {"backbone.body.layer4.0.conv2": 1}
    # the pyramid's width is also that of Detectron2's RPN
    assert dict(plan.keep) == {"backbone.body.layer3": 512, "backbone.fpn.layer_blocks": 96, "rpn.head.conv.0.0": 96}
    rgb = seeded_image((133, 170), seed=1)
    expected = predictor(rgb[:, :, ::-1])["instances"]
    (found,) = TorchPredictor(imported.model, "box", imported.header.categories, device="cpu")([rgb])
    assert len(found) == len(expected) > 0
    assert np.abs(found.scores - expected.scores.numpy()).max() < 1e-3
    distance = np.abs(found.boxes[:, None] - expected.pred_boxes.tensor.numpy()[None]).max(axis=-1)
    assert max(distance.min(axis=0).max(), distance.min(axis=1).max()) < 0.1


def test_wrong_pixels_name_what_to_set(tmp_path: Path, checkpoint: Path) -> None:
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    config = get_cfg()
    config.merge_from_file(str(write_config(tmp_path / "c.yaml", checkpoint, {})))
    with pytest.raises(UserError, match=r"INPUT.FORMAT: RGB, MODEL.PIXEL_MEAN: \[123.675, 116.28, 103.53\]"):
        build_model(config)
