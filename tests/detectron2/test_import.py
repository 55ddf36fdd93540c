"""Reading configurations, mapping keys, and what is said when they do not fit. Detectron2 is not needed."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from seeded import HERE, TASKS, seeded_weights, zoo_shapes
from torch import nn

from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.commands import run
from norton_deploy.detectron2.checkpoint import import_detectron2
from norton_deploy.detectron2.config import read_config
from norton_deploy.detectron2.weights import convert_weights, detectron2_name
from norton_deploy.errors import UserError
from norton_deploy.structures import Categories
from norton_deploy.training.initial_weights import training_categories

PARAMETERS = {"box": 41_699_936, "mask": 44_343_216, "keypoint": 59_133_158}
CONFIG = HERE / "configs" / "box.yaml"


def write_config(path: Path, **sections: object) -> Path:
    """A YAML file over the tests' base."""
    path.write_text(yaml.safe_dump({"_BASE_": str(HERE / "configs" / "base.yaml"), **sections}))
    return path


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    """Seeded weights of the zoo's Faster R-CNN."""
    return seeded_weights(zoo_shapes("box"), seed=1)


def save(path: Path, tensors: dict[str, np.ndarray]) -> Path:
    path.write_bytes(pickle.dumps({"model": tensors}))
    return path


def convert(config: Path, tensors: dict[str, np.ndarray], model: nn.Module) -> dict[str, torch.Tensor]:
    """The conversion alone, without files of 170 MB."""
    state = {name: torch.from_numpy(array) for name, array in tensors.items()}
    return convert_weights(state, model, read_config(config), "m.pkl")


@pytest.fixture(scope="module")
def faster_rcnn() -> nn.Module:
    return read_config(CONFIG).settings().build("box")


@pytest.mark.parametrize("task", TASKS)
def test_every_key_of_the_zoo_has_one_place_of_its_shape(task: str) -> None:
    config = read_config(HERE / "configs" / f"{task}.yaml")
    state = config.settings().build(config.task).state_dict()
    shapes = zoo_shapes(task)
    ours = {detectron2_name(name): tuple(tensor.shape) for name, tensor in state.items()}
    assert len(ours) == len(state) and ours.keys() == shapes.keys()
    different = {name for name in ours if ours[name] != shapes[name]}
    # the only rows that Detectron2 does not have are the background's
    assert different == {
        f"roi_heads.{head}.{kind}"
        for head in ("box_predictor.bbox_pred", *(["mask_head.predictor"] if task == "mask" else []))
        for kind in ("weight", "bias")
    }
    trained = sum(np.prod(shape) for name, shape in shapes.items() if ".norm." not in name)
    assert trained == PARAMETERS[task]


def test_settings_of_the_zoo() -> None:
    settings = read_config(CONFIG).settings()
    backbone, layers, image = settings.backbone, settings.detectron2, settings.image
    assert settings.num_classes == 81 and backbone.trainable_layers == 3 and backbone.norm == "frozen"
    assert layers.stride_in_1x1 and layers.roi_align_aligned and layers.roi_sampling_ratio == 0
    assert layers.level_strides == (4, 8, 16, 32, 64) and not layers.anchor_rounding
    assert image.mean == pytest.approx((123.675 / 255, 116.28 / 255, 103.53 / 255))
    assert image.std == pytest.approx((1 / 255,) * 3)
    assert image.train_short_sides == (128, 160) and settings.rpn.post_nms == (100, 60)


def test_weights_are_permuted_as_documented(weights: dict[str, np.ndarray], faster_rcnn: nn.Module) -> None:
    state = convert(CONFIG, weights, faster_rcnn)
    stem = torch.from_numpy(weights["backbone.bottom_up.stem.conv1.weight"])
    assert torch.equal(state["backbone.body.conv1.weight"], stem[:, [2, 1, 0]])
    classes = torch.from_numpy(weights["roi_heads.box_predictor.cls_score.bias"])
    assert torch.equal(state["roi_heads.box_predictor.cls_score.bias"], torch.cat([classes[-1:], classes[:-1]]))
    boxes = state["roi_heads.box_predictor.bbox_pred.bias"]
    assert torch.equal(boxes[:4], torch.zeros(4))
    assert torch.equal(boxes[4:], torch.from_numpy(weights["roi_heads.box_predictor.bbox_pred.bias"]))


def test_class_agnostic_boxes_and_rgb(tmp_path: Path, weights: dict[str, np.ndarray], faster_rcnn: nn.Module) -> None:
    head = {"CLS_AGNOSTIC_BBOX_REG": True}
    config = write_config(tmp_path / "c.yaml", MODEL={"ROI_BOX_HEAD": head}, INPUT={"FORMAT": "RGB"})
    changed = dict(weights)
    for kind in ("weight", "bias"):
        name = f"roi_heads.box_predictor.bbox_pred.{kind}"
        changed[name] = weights[name][:4]
    state = convert(config, changed, faster_rcnn)
    shared = torch.from_numpy(changed["roi_heads.box_predictor.bbox_pred.bias"])
    assert torch.equal(state["roi_heads.box_predictor.bbox_pred.bias"][4:].reshape(80, 4), shared.expand(80, 4))
    stem = torch.from_numpy(weights["backbone.bottom_up.stem.conv1.weight"])
    assert torch.equal(state["backbone.body.conv1.weight"], stem)


def test_pixels_and_anchors_in_older_files_are_checked(weights: dict[str, np.ndarray], faster_rcnn: nn.Module) -> None:
    old = dict(weights)
    old["pixel_mean"] = np.array([103.53, 116.28, 123.675], np.float32).reshape(3, 1, 1)
    side, half = 32 / np.sqrt(2), 32 * np.sqrt(2)
    cell = np.array([[half, side], [32, 32], [side, half]], np.float32) / 2
    name = "proposal_generator.anchor_generator.cell_anchors.0"
    old[name] = np.concatenate([-cell, cell], axis=1).astype(np.float32)
    convert(CONFIG, old, faster_rcnn)
    with pytest.raises(UserError, match="holds other anchors"):
        convert(CONFIG, old | {name: old[name] + 1}, faster_rcnn)
    with pytest.raises(UserError, match=r"'pixel_mean' is .* MODEL.PIXEL_MEAN"):
        convert(CONFIG, old | {"pixel_mean": old["pixel_mean"][::-1].copy()}, faster_rcnn)


def test_first_key_that_does_not_fit_is_named(
    tmp_path: Path, weights: dict[str, np.ndarray], faster_rcnn: nn.Module
) -> None:
    lateral = "backbone.fpn_lateral3.weight"
    cases = {
        f"key '{lateral}' has shape .256, 511, 1, 1., expected .256, 512, 1, 1.": weights
        | {lateral: weights[lateral][:, :-1]},
        f"the key '{lateral}' is missing": {name: array for name, array in weights.items() if name != lateral},
        "the key 'head.cls_subnet.0.weight' has no place": {"head.cls_subnet.0.weight": np.ones(2, np.float32)}
        | weights,
    }
    for message, tensors in cases.items():
        with pytest.raises(UserError, match=message):
            convert(CONFIG, tensors, faster_rcnn)
    with pytest.raises(UserError, match=r"mask_head.* is missing"):
        import_detectron2(HERE / "configs" / "mask.yaml", save(tmp_path / "m.pkl", weights))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"META_ARCHITECTURE": "RetinaNet"}, "MODEL.META_ARCHITECTURE is 'RetinaNet'"),
        ({"RESNETS": {"NUM_GROUPS": 32}}, "MODEL.RESNETS.NUM_GROUPS is 32, expected 1"),
        ({"FPN": {"NORM": "GN"}}, "MODEL.FPN.NORM is 'GN'"),
        ({"BACKBONE": {"NAME": "build_vit"}}, "MODEL.BACKBONE.NAME is 'build_vit', expected one of"),
        ({"MASK_ON": True, "KEYPOINT_ON": True}, "MASK_ON and KEYPOINT_ON"),
        ({"MASK_ON": True, "ROI_MASK_HEAD": {"POOLER_SAMPLING_RATIO": 2}}, "POOLER_SAMPLING_RATIO differ"),
        ({"ANCHOR_GENERATOR": {"SIZES": [[32, 64]]}}, "MODEL.ANCHOR_GENERATOR.SIZES"),
    ],
)
def test_what_cannot_be_expressed_is_refused(tmp_path: Path, section: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_config(write_config(tmp_path / "c.yaml", MODEL=section)).settings()


def test_configuration_files(tmp_path: Path) -> None:
    base = write_config(tmp_path / "a.yaml", INPUT={"MIN_SIZE_TRAIN": "(640, 672)", "MAX_SIZE_TEST": 700})
    child = tmp_path / "b.yaml"
    child.write_text("_BASE_: a.yaml\nINPUT: {MAX_SIZE_TEST: 900, MIN_SIZE_TRAIN_SAMPLING: range}\nOTHER: {KEY: 1}\n")
    image = read_config(child).settings().image
    assert image.max_size == 900 and image.train_short_sides == tuple(range(640, 673))
    assert read_config(base).settings().image.train_short_sides == (640, 672)
    base.write_text("_BASE_: b.yaml\n")
    with pytest.raises(UserError, match="is based on itself"):
        read_config(child)
    base.write_text("MODEL: !!python/object/apply:os.getcwd []\n")
    with pytest.raises(UserError, match=r"a.yaml: not valid YAML"):
        read_config(child)
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "none.yaml")


def test_command_writes_a_checkpoint_that_loads(
    tmp_path: Path, weights: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "model_final.pth", tmp_path / "imported.safetensors"
    state = {name: torch.from_numpy(array) for name, array in weights.items()}
    torch.save({"model": state, "iteration": 7}, source)
    arguments = ["--config", str(CONFIG), "--weights", str(source), "--out", str(out)]
    assert run("import_detectron2", arguments) == 0
    checkpoint = load_checkpoint(out)
    categories = checkpoint.header.categories
    assert categories.labels == tuple(range(1, 81))
    assert (categories.ids[0], categories.ids[-1], categories.names[-1]) == (1, 90, "toothbrush")
    assert checkpoint.header.lineage[-1]["source"] == str(source)
    missing, other = str(tmp_path / "none.pkl"), str(tmp_path / "other.safetensors")
    assert run("import_detectron2", [*arguments[:3], missing, "--out", other]) == 1
    assert "none.pkl: cannot read" in capsys.readouterr().err


def test_fine_tuning_keeps_the_labels_of_the_imported_model(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    imported = import_detectron2(CONFIG, save(tmp_path / "m.pkl", weights))
    path = tmp_path / "imported.safetensors"
    save_checkpoint(path, imported.model, imported.header)
    own = imported.header.categories
    data = Categories(own.ids, own.ids, own.names)  # torchvision's labels of the same categories
    assert training_categories("box", data, path) == own != data
    assert training_categories("mask", data, path) == data
    assert training_categories("box", Categories((1, 2), (1, 2), ("a", "b")), path).labels == (1, 2)
    assert training_categories("box", data, None) == data


def test_categories_of_other_data(tmp_path: Path, weights: dict[str, np.ndarray]) -> None:
    heads = {"ROI_HEADS": {"NUM_CLASSES": 2}}
    config = write_config(tmp_path / "c.yaml", MODEL=heads)
    small = dict(weights)
    for name, rows in (("cls_score", 3), ("bbox_pred", 8)):
        for kind in ("weight", "bias"):
            key = f"roi_heads.box_predictor.{name}.{kind}"
            small[key] = weights[key][:rows]
    path = save(tmp_path / "m.pkl", small)
    assert import_detectron2(config, path).header.categories.names == ("class 1", "class 2")
    annotations = tmp_path / "a.json"
    annotations.write_text('{"categories": [{"id": 9, "name": "late"}, {"id": 4, "name": "early"}]}')
    categories = import_detectron2(config, path, annotations).header.categories
    assert (categories.ids, categories.names, categories.labels) == ((4, 9), ("early", "late"), (1, 2))
    annotations.write_text('{"categories": [{"id": 9, "name": "late"}]}')
    with pytest.raises(UserError, match="has 1 categories, but the model has 2 classes"):
        import_detectron2(config, path, annotations)
