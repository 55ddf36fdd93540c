import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_detector import tiny_arguments

from norton_deploy.checkpoints.checkpoint import load_checkpoint, read_header
from norton_deploy.commands import compress as compress_command
from norton_deploy.commands.train_det import main
from norton_deploy.compression.compress import compress, compress_with_kept
from norton_deploy.data.synthetic import write_dataset
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.training import detector_training
from norton_deploy.training.batches import Batch
from norton_deploy.training.distillation import DetectorImitation, correlation_loss
from norton_deploy.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", norm="group", trainable_layers=5, fpn_channels=16),
    roi=RoiSettings(box_features=16),
    image=ImageSettings(64, 64),
    rpn=RpnSettings(anchor_sizes=(8, 16, 32, 48, 64)),
)
NARROW = CompressionPlan("rcnn", {}, {"backbone.fpn.layer_blocks": 6})
SMALL = CompressionPlan("rcnn", {"backbone.body.layer4.1.conv2": 1}, {"backbone.fpn.layer_blocks": 6})


def dense_detector() -> torch.nn.Module:
    torch.manual_seed(0)
    return SETTINGS.build("box").train()


def batch() -> Batch:
    torch.manual_seed(1)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    images = [torch.rand(3, 64, 60), torch.rand(3, 50, 64)]
    return Batch(images, [dict(target), dict(target)], [1, 2])


def test_the_loss_is_one_minus_pearsons_correlation():
    torch.manual_seed(0)
    teacher = torch.randn(3, 4, 5, 6)
    student = 0.3 * teacher * torch.tensor([1.0, -2.0, 0.0, 5.0]).view(4, 1, 1) + torch.randn(3, 4, 5, 6) + 7
    expected = [
        1 - np.corrcoef(student[:, channel].flatten().numpy(), teacher[:, channel].flatten().numpy())[0, 1]
        for channel in range(4)
    ]
    assert float(correlation_loss(student, teacher)) == pytest.approx(np.mean(expected), abs=1e-6)
    assert float(correlation_loss(3 * teacher + 2, teacher)) == pytest.approx(0, abs=1e-6)
    assert float(correlation_loss(-teacher, teacher)) == pytest.approx(2, abs=1e-6)


def test_constant_channels_have_a_loss_and_a_finite_gradient():
    teacher = torch.randn(2, 2, 4, 4)
    student = torch.cat([teacher[:, :1], torch.ones(2, 1, 4, 4)], dim=1).requires_grad_()
    loss = correlation_loss(student, teacher)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.25, abs=1e-5)  # mean of 0 and 0.5
    assert float(student.grad.abs().max()) < 1e3
    assert float(correlation_loss(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))) == 0


def test_identical_twins_have_nothing_to_imitate_and_images_are_transformed_once(monkeypatch):
    student, teacher = dense_detector(), dense_detector()
    calls = []
    monkeypatch.setattr(
        student.transform, "batch_images", lambda images, size_divisible: calls.append(0) or pad(images)
    )
    monkeypatch.setattr(teacher.transform, "batch_images", lambda *_: pytest.fail("the teacher transforms too"))
    losses = DetectorImitation(student, teacher, None, pyramid_weight=6.0)(student, batch())
    assert float(losses["imitation"].detach()) == 0.0
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "imitation"}
    assert len(calls) == 1
    assert not student.backbone._forward_hooks  # nothing stays behind


def pad(images):
    return torch.stack([torch.nn.functional.pad(i, (0, 64 - i.shape[2], 0, 64 - i.shape[1])) for i in images])


def test_gradients_reach_the_student_only():
    teacher = dense_detector()
    student = compress(dense_detector(), CompressionPlan("rcnn", {"backbone.body.layer2.0.conv2": 1}), starts=1)
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    imitation = DetectorImitation(student, teacher, None, pyramid_weight=2.0)(student, batch())["imitation"]
    assert float(imitation.detach()) > 0
    imitation.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {name for name in reached if not name.startswith("backbone.")} == set()
    assert {"backbone.body.conv1.weight", "backbone.fpn.layer_blocks.3.0.weight"} <= reached


def test_a_narrowed_pyramid_imitates_the_channels_that_were_kept():
    teacher = dense_detector()
    compressed = compress_with_kept(teacher, NARROW)
    student, channels = compressed.model, compressed.kept["backbone.fpn.layer_blocks"]
    weight = 6.0
    assert (
        float(
            DetectorImitation(student, teacher, channels, pyramid_weight=weight)(student, batch())["imitation"].detach()
        )
        < 1e-5
    )
    others = torch.tensor([c for c in range(16) if c not in channels])[:6]
    assert (
        float(
            DetectorImitation(student, teacher, others, pyramid_weight=weight)(student, batch())["imitation"].detach()
        )
        > 1
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Data, a dense mask detector after one step, and two detectors that were compressed from it."""
    root = tmp_path_factory.mktemp("distillation")
    write_dataset(root / "data", 8, 2, seed=5, image_sizes=(80, 100))
    main(tiny_arguments(root / "data", root / "dense", "mask", "--steps", "1"))
    for name, plan in (("narrow", NARROW), ("small", SMALL)):
        plan.save(root / f"{name}.yaml")
        model = ["--model", str(root / "dense" / "last.safetensors"), "--starts", "1"]
        compress_command.main(
            [*model, "--plan", str(root / f"{name}.yaml"), "--out", str(root / f"{name}.safetensors")]
        )
    return root


def arguments(trained, out, *more, init="small"):
    teacher = ["--teacher", str(trained / "dense" / "last.safetensors")]
    start = ["--init", str(trained / f"{init}.safetensors")]
    return tiny_arguments(trained / "data", out, "mask", *start, *teacher, *more)


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines if line["section"] == "train"]


def test_checkpoints_know_the_channels_of_their_pyramid(trained, tmp_path):
    channels = read_header(trained / "narrow.safetensors").pyramid_channels
    dense, narrow = (load_file(trained / name) for name in ("dense/last.safetensors", "narrow.safetensors"))
    layer = "backbone.fpn.layer_blocks.0.0.weight"
    assert torch.equal(narrow[layer], dense[layer][list(channels)])
    assert read_header(trained / "dense" / "last.safetensors").pyramid_channels is None
    main(arguments(trained, tmp_path / "run", "--steps", "1", init="narrow"))
    assert load_checkpoint(tmp_path / "run" / "last.safetensors").header.pyramid_channels == channels
    [first] = losses(tmp_path / "run")
    assert first["imitation"] < 1e-4 < first["loss_mask"]  # only pruned, not decomposed: equal where it is left


class KilledError(Exception):
    """Stands in for SIGKILL."""


class DyingTrainer(Trainer):
    """Dies in its fourth step."""

    def _train_step(self, batch):
        if self.step == 3:
            raise KilledError
        return super()._train_step(batch)


@pytest.mark.slow
def test_resume_leaves_no_trace(trained, tmp_path, monkeypatch):
    steps = ["--steps", "5", "--state-every", "2", "--distillation-weight", "1"]
    main(arguments(trained, tmp_path / "whole", *steps))
    with monkeypatch.context() as patch:
        patch.setattr(detector_training, "Trainer", DyingTrainer)
        with pytest.raises(KilledError):
            main(arguments(trained, tmp_path / "killed", *steps))
    main(arguments(trained, tmp_path / "killed", *steps, "--resume"))
    resumed, expected = (load_file(tmp_path / name / "last.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    steps[-1] = "2"
    with pytest.raises(UserError, match=r"'distillation_weight' was 1\.0 and is now 2\.0"):
        main(arguments(trained, tmp_path / "killed", *steps, "--resume"))


def test_without_a_teacher_a_run_is_what_it_was(trained):
    settings = detector_training.DetectorTrainingSettings(out=trained, steps=1, task="box", data=trained)
    assert not {"teacher", "distill", "distillation_weight", "head_weight"} & settings.identity().keys()


@pytest.mark.parametrize(
    ("distill", "weighed"),
    [
        ("pyramid", {"distillation_weight"}),
        ("heads", {"head_weight"}),
        ("both", {"distillation_weight", "head_weight"}),
    ],
)
def test_what_is_imitated_decides_which_weights_count(trained, distill, weighed):
    settings = detector_training.DetectorTrainingSettings(
        out=trained, steps=1, task="mask", data=trained, teacher=trained / "dense/last.safetensors", distill=distill
    )
    assert {"distillation_weight", "head_weight"} & settings.identity().keys() == weighed


def test_what_is_imitated_is_a_setting(trained, tmp_path):
    found = {}
    for distill in ("pyramid", "both"):
        main(arguments(trained, tmp_path / distill, "--steps", "1", "--distill", distill))
        [found[distill]] = losses(tmp_path / distill)
    heads = {"class_imitation", "box_imitation", "mask_imitation"}
    assert heads <= found["both"].keys() and not heads & found["pyramid"].keys()
    assert found["both"]["imitation"] == found["pyramid"]["imitation"]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("box", {}, "task is mask, the student's is box"),
        ("mask", {"teacher": "small.safetensors"}, "plan: it is compressed otherwise"),
        ("mask", {"detector.image.min-size": "72"}, "min_size is 80, the student's is 72"),
        ("mask", {"detector.image.mean": "0 0 0"}, r"image\.mean is \(0\.485, 0\.456, 0\.406\), the student's is"),
        ("mask", {"detector.detectron2.box-delta-weights": "1 1 1 1"}, "box_delta_weights is"),
        ("mask", {"detector.backbone.fpn-channels": "8"}, "fpn_channels is 16, the student's pyramid has 8 channels"),
        ("mask", {"data": "two"}, "categories are "),
        ("mask", {"distillation-weight": "0"}, "distillation_weight: expected a positive number"),
    ],
)
def test_a_teacher_that_does_not_fit_is_named(trained, tmp_path, task, changes, message):
    data = trained / "data"
    if changes.get("data"):
        data = tmp_path / "two"
        write_dataset(data, 2, 2, seed=5, image_sizes=(80, 100))
        for file in (data / "annotations").glob("instances*"):
            content = json.loads(file.read_text())
            content["categories"] = content["categories"][:2]
            known = {category["id"] for category in content["categories"]}
            content["annotations"] = [entry for entry in content["annotations"] if entry["category_id"] in known]
            file.write_text(json.dumps(content))
    teacher = trained / changes.get("teacher", "dense/last.safetensors")
    more = ["--steps", "1", "--teacher", str(teacher)]
    for name, value in changes.items():
        more += [] if name in ("teacher", "data") else [f"--{name}", *value.split()]
    with pytest.raises(UserError, match=message):
        main(tiny_arguments(data, tmp_path / "run", task, *more))
    assert not (tmp_path / "run").exists()
