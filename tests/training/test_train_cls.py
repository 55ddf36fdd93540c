import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands.train_cls import main
from norton_deploy.data.classification import ClassificationFolder
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_classifier

COLOURS = {"blue": (40, 60, 210), "green": (50, 200, 60), "red": (220, 50, 40)}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes of noisy one-coloured 32 px images, which a few steps can tell apart."""
    root = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3)):
        for name, colour in COLOURS.items():
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = generator.normal(colour, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{index}.png")
    return root


def arguments(data, out, *more):
    common = "--image-size 32 32 --style cifar --batch-size 6 --workers 0 --lr 0.01 --warmup-steps 2 --no-progress"
    return ["--data", str(data), "--out", str(out), *common.split(), "--device", "cpu", *more]


def test_a_classifier_learns_and_its_checkpoint_says_how_well(colours, tmp_path):
    out, figures = tmp_path / "run", tmp_path / "figures.json"
    settings = ["--arch", "resnet18", "--steps", "12", "--label-smoothing", "0.1", "--json", str(figures)]
    assert main(arguments(colours, out, *settings)) == 0
    report = json.loads(figures.read_text())
    assert report["steps"] == 12 and report["metrics"]["classification"]["top5"] == 1.0
    checkpoint = load_checkpoint(out / "last.safetensors")
    assert checkpoint.header.categories.names == ("blue", "green", "red")
    assert checkpoint.header.settings.image_size == (32, 32)
    dataset = ClassificationFolder(colours, "val", style="cifar", image_size=(32, 32))
    scores = evaluate_classifier(checkpoint.model, dataset, torch.device("cpu"), progress=False)
    assert scores == report["metrics"]["classification"]
    losses = [json.loads(line)["losses"]["total"] for line in (out / "log.jsonl").open() if '"train"' in line]
    assert losses[-1] < 1.0986  # ln 3: better than chance
    # another number of classes keeps everything but the last layer
    small = tmp_path / "small"
    for name in ("blue", "red"):
        for split in ("train", "val"):
            (small / split).mkdir(parents=True, exist_ok=True)
            (small / split / name).symlink_to(colours / split / name)
    again = ["--arch", "resnet18", "--steps", "1", "--init", str(out / "last.safetensors")]
    main(arguments(small, tmp_path / "again", *again, "--norm", "frozen", "--lr", "1e-20"))
    before, after = load_file(out / "last.safetensors"), load_file(tmp_path / "again" / "last.safetensors")
    assert torch.equal(after["layer4.1.conv2.weight"], before["layer4.1.conv2.weight"])
    assert after["fc.weight"].shape == (2, 512)


def test_another_architecture_is_named(colours, tmp_path):
    main(arguments(colours, tmp_path / "run", "--arch", "resnet18", "--steps", "1"))
    init = ["--arch", "vgg16_bn", "--steps", "1", "--init", str(tmp_path / "run" / "last.safetensors")]
    with pytest.raises(UserError, match="holds resnet18, expected a checkpoint of the classifier vgg16_bn"):
        main(arguments(colours, tmp_path / "other", *init))


def test_accuracy_is_counted():
    """Four images of classes 0..3 and a model that ranks the classes alike for all of them."""

    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([0.1, 0.4, 0.3, 0.2, 0.0, 0.05, -1.0]).repeat(len(images), 1)

    dataset = [(torch.zeros(3, 2, 2), label, "") for label in (1, 1, 4, 6)]
    scores = evaluate_classifier(Fixed().eval(), dataset, torch.device("cpu"), batch_size=3, progress=False)
    assert scores == {"top1": 0.5, "top5": 0.5}
    scores = evaluate_classifier(Fixed().eval(), [*dataset[:2], (torch.zeros(3, 2, 2), 5, "")], torch.device("cpu"))
    assert scores == {"top1": pytest.approx(2 / 3), "top5": 1.0}
