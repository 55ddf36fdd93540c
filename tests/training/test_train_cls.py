import json

import pytest
import torch
from safetensors.torch import load_file

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, load_checkpoint, save_checkpoint
from norton_deploy.commands.train_cls import main
from norton_deploy.data.resident_images import ResidentImages, read_resident_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_classifier
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.training import classifier_training
from norton_deploy.training.trainer import Trainer
from tests.class_images import BLUE_AND_RED, write_class_images

COLOURS = {"blue": BLUE_AND_RED["blue"], "green": (50, 200, 60), "red": BLUE_AND_RED["red"]}


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """Three classes of noisy one-coloured 32 px images, which a few steps can tell apart."""
    return write_class_images(tmp_path_factory.mktemp("colours"), {"train": 8, "val": 3}, COLOURS)


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
    mean, std = checkpoint.header.settings.image_mean, checkpoint.header.settings.image_std
    dataset = read_resident_images(colours, "val", image_size=(32, 32), mean=mean, std=std)
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


def test_colours_are_normalised_as_the_initial_model_wants_them(colours, tmp_path):
    settings = ClassifierSettings("resnet18", 3, image_size=(32, 32), image_mean=(0.4, 0.5, 0.6), image_std=(0.2,) * 3)
    init = tmp_path / "init.safetensors"
    save_checkpoint(init, settings.build(), CheckpointHeader("cls", settings, None, class_categories(tuple(COLOURS))))
    more = ["--arch", "resnet18", "--steps", "1", "--lr", "1e-20", "--init", str(init)]
    main(arguments(colours, tmp_path / "run", *more, "--teacher", str(init)))
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").header.settings == settings
    plain = ["--arch", "resnet18", "--steps", "1", "--teacher", str(init)]
    with pytest.raises(UserError, match=r"image_mean is \(0\.4, 0\.5, 0\.6\), the student's is \(0\.485"):
        main(arguments(colours, tmp_path / "other", *plain))


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

    def scores(*labels):
        pixels, colour = torch.zeros(len(labels), 2, 2, 3, dtype=torch.uint8), torch.ones(3)
        images = ResidentImages(pixels, torch.tensor(labels), ("",) * 7, labels, colour, colour)
        read_later = [(torch.zeros(3, 2, 2), label, "") for label in labels]
        for dataset in (images, read_later):
            found = evaluate_classifier(Fixed().eval(), dataset, torch.device("cpu"), batch_size=3, progress=False)
            yield found["top1"], found["top5"]

    assert set(scores(1, 1, 4, 6)) == {(0.5, 0.5)}
    assert set(scores(1, 1, 5)) == {(2 / 3, 1.0)}


class DyingTrainer(Trainer):
    """Dies in its sixth step, the second of its second epoch."""

    def _train_step(self, batch):
        if self.step == 5:
            raise RuntimeError("killed")
        return super()._train_step(batch)


def test_a_run_on_resident_images_resumes_without_a_trace(colours, tmp_path, monkeypatch):
    more = ["--arch", "resnet18", "--steps", "7", "--state-every", "3", "--cutout", "8"]
    main(arguments(colours, tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        patch.setattr(classifier_training, "Trainer", DyingTrainer)
        with pytest.raises(RuntimeError, match="killed"):
            main(arguments(colours, tmp_path / "killed", *more))
    main(arguments(colours, tmp_path / "killed", *more, "--resume"))
    resumed, expected = (load_file(tmp_path / name / "last.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    with pytest.raises(UserError, match="cutout: expected 0 or more, with style cifar, got 8 with imagenet"):
        main(arguments(colours, tmp_path / "imagenet", *more, "--style", "imagenet"))
