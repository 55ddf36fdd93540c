"""Distillation of class scores: the loss against its definition, the weights' balance, and --teacher end to end."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands.train_cls import main
from norton_deploy.errors import UserError
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.training.batches import Batch
from norton_deploy.training.classifier_training import ClassifierTrainingSettings, train_classifier
from norton_deploy.training.distillation import DistilledClassification, distillation_loss
from norton_deploy.training.initial_weights import InitialModel
from tests.class_images import BLUE_AND_RED, write_class_images


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return write_class_images(tmp_path_factory.mktemp("colours"), {"train": 6, "val": 2}, BLUE_AND_RED)


def arguments(data, out, *more):
    common = "--arch vgg16_bn --image-size 32 32 --style cifar --batch-size 4 --workers 0 --lr 0.01 --warmup-steps 1"
    return ["--data", str(data), "--out", str(out), *common.split(), "--no-progress", "--device", "cpu", *more]


def test_the_loss_is_hintons() -> None:
    student, teacher, T = [[0.5, -1.0, 2.0], [0.0, 0.0, 1.0]], [[1.0, 0.0, 1.5], [2.0, -1.0, 0.0]], 3.0

    def softmax(row):
        shares = [math.exp(value / T) for value in row]
        return [share / sum(shares) for share in shares]

    pairs = [zip(softmax(t), softmax(s), strict=True) for s, t in zip(student, teacher, strict=True)]
    expected = T**2 * sum(p * math.log(p / q) for pair in pairs for p, q in pair) / 2
    found = distillation_loss(torch.tensor(student), torch.tensor(teacher), T)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(torch.tensor(teacher), torch.tensor(teacher), T)) == pytest.approx(0, abs=1e-6)


def test_a_high_temperature_is_the_regression_of_centred_logits() -> None:
    # Hinton et al., section 2.1: for large T the gradient is that of 1/(2 K) |z_s - z_t|^2 of centred logits.
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    centred = [logits - logits.mean(dim=1, keepdim=True) for logits in (student, teacher)]
    expected = (centred[0] - centred[1]).square().sum() / (2 * 5)
    torch.testing.assert_close(distillation_loss(student, teacher, 100.0).double(), expected, rtol=0.02, atol=0)


def test_the_terms_are_weighted_and_the_teacher_stays() -> None:
    torch.manual_seed(0)
    student, teacher = nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train()
    batch = Batch(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]), list("abcdef"))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    terms = DistilledClassification(teacher, weight=0.3, temperature=2.0, smoothing=0.1)(student, batch)
    hard = functional.cross_entropy(student(batch.images), batch.targets, label_smoothing=0.1)
    soft = distillation_loss(student(batch.images), teacher(batch.images), 2.0)
    torch.testing.assert_close(terms["classification"], 0.7 * hard)
    torch.testing.assert_close(terms["distillation"], 0.3 * soft)
    (terms["classification"] + terms["distillation"]).backward()
    assert student.weight.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())


def test_the_terms_are_logged_and_the_settings_belong_to_the_run(colours, tmp_path) -> None:
    main(arguments(colours, tmp_path / "teacher", "--steps", "2"))
    teacher = tmp_path / "teacher" / "last.safetensors"
    more = ["--steps", "3", "--teacher", str(teacher), "--distillation-weight", "0.9", "--temperature", "2"]
    main(arguments(colours, tmp_path / "student", *more))
    lines = [json.loads(line) for line in (tmp_path / "student" / "log.jsonl").open()]
    assert {"classification", "distillation", "total"} == set(lines[0]["losses"])
    resumed = arguments(colours, tmp_path / "student", *more[:-1], "3", "--resume")
    with pytest.raises(UserError, match=r"'temperature' was 2\.0 and is now 3\.0"):
        main(resumed)


def test_runs_without_a_teacher_are_the_same_run_as_before(tmp_path) -> None:
    settings = ClassifierTrainingSettings(data=tmp_path, out=tmp_path / "run", steps=1)
    assert not {"teacher", "distillation_weight", "temperature"} & set(settings.identity())
    taught = ClassifierTrainingSettings(data=tmp_path, out=tmp_path / "run", steps=1, teacher=tmp_path / "t")
    assert {"teacher", "distillation_weight", "temperature"} <= set(taught.identity())


def test_mistakes_are_named(colours, tmp_path) -> None:
    main(arguments(colours, tmp_path / "run", "--steps", "1"))
    other = tmp_path / "other"
    for split in ("train", "val"):
        (other / split).mkdir(parents=True)
        (other / split / "blue").symlink_to(colours / split / "blue")
        (other / split / "yellow").symlink_to(colours / split / "red")
    more = ["--steps", "1", "--teacher", str(tmp_path / "run" / "last.safetensors")]
    with pytest.raises(UserError, match=r"knows the classes blue, red, .* the data has blue, yellow"):
        main(arguments(other, tmp_path / "new", *more))
    with pytest.raises(UserError, match="distillation_weight: expected above 0"):
        ClassifierTrainingSettings(data=other, out=tmp_path / "x", steps=1, distillation_weight=1.5)
    with pytest.raises(UserError, match="temperature: expected a positive"):
        ClassifierTrainingSettings(data=other, out=tmp_path / "x", steps=1, temperature=0)


def test_a_model_that_no_checkpoint_can_name_is_trained_and_resumed(colours, tmp_path) -> None:
    def start() -> InitialModel:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 4, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 49, 2))
        return InitialModel(model, ClassifierSettings("vgg16_bn", 2, image_size=(32, 32)), None, "a chain")

    def settings(out, **changes):
        values = {"batch_size": 4, "workers": 0, "lr": 0.01, "warmup_steps": 1, "progress": False, "device": "cpu"}
        values |= {"arch": "vgg16_bn", "image_size": (32, 32), "style": "cifar", "steps": 4}
        return ClassifierTrainingSettings(data=colours, out=out, **{**values, **changes})

    whole = train_classifier(settings(tmp_path / "whole"), command="test", start=start())
    done = train_classifier(settings(tmp_path / "whole", resume=True), command="test", start=start())
    assert done.steps == 4 and done.metrics == whole.metrics
    weights = load_file(tmp_path / "whole" / "last.safetensors")
    assert weights["0.weight"].shape == (4, 3, 5, 5)
    with pytest.raises(UserError, match="not a checkpoint of norton_deploy"):
        load_checkpoint(tmp_path / "whole" / "last.safetensors")
