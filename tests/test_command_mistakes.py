"""Wrong numbers and names on the command line end in one line that names them."""

from pathlib import Path

import pytest

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, save_checkpoint
from norton_deploy.commands import run
from norton_deploy.data.synthetic import CATEGORIES
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.structures import Categories

PLANS = Path(__file__).parent.parent / "configs" / "plans"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("complexity --image-size 0 0", "--image-size: expected at least 1, got 0"),
        ("complexity --num-classes 0", "--num-classes: expected at least 2, got 0"),
        ("complexity --task cls --num-classes -3", "--num-classes: expected at least 1, got -3"),
        ("complexity --proposals -1", "--proposals: expected at least 0, got -1"),
        ("plan --model m --budget macs=0.5 --data d --out o --multiple 0", "--multiple: expected at least 1, got 0"),
        ("gradcam --model m --images i --out o.png --compressed", "--compressed: expected one or several"),
        (
            "serve --model a.onnx --baseline b.pt2 --categories names.txt",
            "b.pt2, a.onnx: have their own categories; leave",
        ),
        ("demo_video --model a.onnx --out o.mp4 --categories names.txt", "a.onnx: has its own categories; leave"),
        ("compress --plan p.yaml --out small.pth", "--out small.pth: expected a name that ends in .safetensors"),
    ],
)
def test_mistakes(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = command.split()
    assert run(name, arguments) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_compress_names_another_architecture_and_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.safetensors"
    plan = str(PLANS / "table3.yaml")
    assert run("compress", ["--model", "resnet18", "--plan", plan, "--out", str(out)]) == 1
    assert "table3.yaml: a plan for resnet50, and the model is a resnet18" in capsys.readouterr().err
    assert run("compress", ["--model", "resnet18", "--plan", str(write_plan(tmp_path)), "--out", str(out)]) == 0
    assert "note: the weights of resnet18 are random" in capsys.readouterr().err


def test_compress_does_not_replace_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ClassifierSettings("resnet18", num_classes=6)
    model = tmp_path / "dense.safetensors"
    header = CheckpointHeader("cls", settings, None, Categories.from_coco(CATEGORIES))
    save_checkpoint(model, settings.build(), header)
    before = model.read_bytes()
    assert run("compress", ["--model", str(model), "--plan", str(write_plan(tmp_path)), "--out", str(model)]) == 1
    assert "would be lost" in capsys.readouterr().err and model.read_bytes() == before


def write_plan(folder: Path) -> Path:
    """One layer of a ResNet-18 at rank 1."""
    path = folder / "plan.yaml"
    path.write_text("architecture: resnet18\nranks:\n  layer1.0.conv1: 1\n")
    return path
