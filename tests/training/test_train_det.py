import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_detector import ChancelessTrainer, tiny_arguments, train_without_chance

from norton_deploy import commands
from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, load_checkpoint, save_checkpoint
from norton_deploy.commands.train_det import main
from norton_deploy.compression.compress import compress
from norton_deploy.data.synthetic import write_dataset
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.structures import Categories
from norton_deploy.training import detector_training, trainer
from norton_deploy.training.initial_weights import training_categories

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
pytestmark = pytest.mark.usefixtures("one_thread")
PLAN = CompressionPlan("resnet18", {"layer1.0.conv1": 1}, {"layer1.0.conv1": 40})


@pytest.fixture(scope="module")
def compressed_classifier(tmp_path_factory):
    path = tmp_path_factory.mktemp("init") / "classifier.safetensors"
    settings = ClassifierSettings("resnet18", num_classes=3)
    torch.manual_seed(0)
    model = compress(settings.build(), PLAN, starts=1)
    save_checkpoint(path, model, CheckpointHeader("cls", settings, PLAN, class_categories("abc")))
    return path


def log_lines(out: Path) -> list[dict]:
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


@pytest.mark.slow
def test_sigkill_in_the_middle_of_an_epoch_leaves_no_trace(tiny_coco, tmp_path):
    """An epoch has 3 steps; the state is saved after steps 3, 4, 6 and 8; the death comes after step 5 or 6."""
    steps = ["--steps", "9", "--state-every", "4", "--evaluate-every", "0", "--photometric"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, str(ROOT / "tools" / "train_det.py")]
    process = subprocess.Popen([*command, *tiny_arguments(tiny_coco, killed, "mask", *steps)], env=ENVIRONMENT)
    while process.poll() is None and len(log_lines(killed)) < 5:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed / "best.safetensors").exists()
    main(tiny_arguments(tiny_coco, killed, "mask", *steps, "--resume"))
    main(tiny_arguments(tiny_coco, whole, "mask", *steps))
    resumed, expected = (load_file(out / "last.safetensors") for out in (killed, whole))
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in expected.items())
    unmeasured = {"images_per_s", "memory_mib"}
    logs = [
        [{key: value for key, value in line.items() if key not in unmeasured} for line in log_lines(out)]
        for out in (killed, whole)
    ]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, monkeypatch):
    """All images have one size and yield their full sample of anchors and proposals (see `Trainer`)."""
    data = tmp_path / "data"
    write_dataset(data, 8, 2, seed=5, image_sizes=(96, 96))
    monkeypatch.setattr(detector_training, "Trainer", ChancelessTrainer)
    train_without_chance(data, tmp_path / "one", batch_size=4)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = str(Path(__file__).with_name("tiny_detector.py"))
    subprocess.run([*torchrun, script, str(data), str(tmp_path / "two"), "2"], env=ENVIRONMENT, check=True)
    one, two = (load_file(tmp_path / name / "last.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-5, msg=name)
    losses = [
        [line["losses"] for line in log_lines(tmp_path / name) if line["section"] == "train"] for name in ("one", "two")
    ]
    for first, second in zip(*losses, strict=True):  # as many lines: only the main process writes
        assert second == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("task", ["box", "keypoint"])
def test_from_a_compressed_classifier_to_a_checkpoint(tiny_coco, tmp_path, compressed_classifier, task):
    arguments = tiny_arguments(tiny_coco, tmp_path / "run", task, "--steps", "2", "--detector.backbone.norm", "frozen")
    figures_file = tmp_path / "figures.json"
    arguments += ["--init", str(compressed_classifier), "--json", str(figures_file)]
    arguments += ["--detector.backbone.trainable-layers", "2"]
    assert main(arguments) == 0
    checkpoint = load_checkpoint(tmp_path / "run" / "best.safetensors")
    assert checkpoint.header.plan == PLAN
    lineage = checkpoint.header.lineage[-1]
    assert lineage["source"] == str(compressed_classifier) and len(lineage["source_sha256"]) == 64
    assert lineage["command"].startswith("norton train_det --task")
    before = load_file(compressed_classifier)
    body = checkpoint.model.backbone.body.state_dict()
    assert torch.equal(body["layer1.0.conv1.pointwise.weight"], before["layer1.0.conv1.pointwise.weight"])
    assert torch.equal(body["layer4.0.bn1.weight"], before["layer4.0.bn1.weight"])  # frozen normalisation
    assert not torch.equal(body["layer4.0.conv1.weight"], before["layer4.0.conv1.weight"])
    figures = json.loads(figures_file.read_text())
    assert figures["steps"] == 2
    assert set(figures["metrics"]) == ({"bbox"} if task == "box" else {"bbox", "keypoints"})


def test_init_from_a_detector(tiny_coco, tmp_path, capsys):
    box = tmp_path / "box"
    main(tiny_arguments(tiny_coco, box, "box", "--steps", "1"))
    trained = load_file(box / "last.safetensors")
    none = ["--steps", "1", "--lr", "1e-20", "--init", str(box / "last.safetensors")]
    main(tiny_arguments(tiny_coco, tmp_path / "again", "box", *none))
    again = load_file(tmp_path / "again" / "last.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in trained.items())
    main(tiny_arguments(tiny_coco, tmp_path / "mask", "mask", *none))
    mask = load_file(tmp_path / "mask" / "last.safetensors")
    shared = [name for name in trained if name.startswith("backbone.")]
    assert all(torch.equal(mask[name], trained[name]) for name in shared)
    assert not torch.equal(mask["rpn.head.cls_logits.weight"], trained["rpn.head.cls_logits.weight"])
    assert "own settings" not in capsys.readouterr().err  # the command line gives what the file has
    main(tiny_arguments(tiny_coco, tmp_path / "large", "box", *none, "--detector.image.max-size", "1333"))
    assert "the file's own settings where none but a default is given: image.max_size 128\n" in capsys.readouterr().err


def test_other_objects_under_known_ids_keep_their_own_names(tiny_coco, tmp_path):
    main(tiny_arguments(tiny_coco, tmp_path / "run", "box", "--steps", "1"))
    file = tmp_path / "run" / "last.safetensors"
    own = load_checkpoint(file).header.categories
    assert training_categories("box", own, file) == own
    data = Categories(own.labels, own.ids, ("cup", *own.names[1:]))
    assert training_categories("box", data, file) == data


def test_a_run_is_kept_when_the_one_to_replace_it_cannot_start(tiny_coco, tmp_path, monkeypatch):
    def refuses(*_):
        raise UserError("no optimizer today")

    arguments = tiny_arguments(tiny_coco, tmp_path / "run", "box", "--steps", "1")
    main(arguments)
    before = (tmp_path / "run" / "last.safetensors").read_bytes()
    monkeypatch.setattr(trainer, "build_optimizer", refuses)
    with pytest.raises(UserError, match="no optimizer today"):
        main([*arguments, "--overwrite"])
    assert (tmp_path / "run" / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--detector.image.min-size", "-5"], "min_size: expected 1 to 8192"),
        (["--evaluation-images", "0"], "--evaluation-images: expected at least 1"),
        (["--detector.backbone.norm", "frozen"], "goes with a pretrained backbone"),
        (["--detector.backbone.norm", "sync"], "sync needs GPUs"),
        (["--detector.num-classes", "5"], r"num_classes is 5, but the data has 7"),
        (["--init", "nowhere.safetensors"], r"nowhere\.safetensors: no such file"),
        (["--precision", "fp16"], "fp16 needs a GPU"),
    ],
)
def test_impossible_runs_say_why(tiny_coco, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        main(tiny_arguments(tiny_coco, tmp_path / "run", "box", "--steps", "1", *changes))
    assert not (tmp_path / "run").exists()


def test_a_plan_does_not_go_with_init(tiny_coco, tmp_path, compressed_classifier):
    changes = ["--steps", "1", "--init", str(compressed_classifier), "--plan", "plan.yaml"]
    with pytest.raises(UserError, match=r"--plan plan\.yaml: "):
        main(tiny_arguments(tiny_coco, tmp_path / "run", "box", *changes))


def test_a_user_mistake_is_one_line_and_status_1(tiny_coco, tmp_path, capsys):
    arguments = tiny_arguments(tiny_coco, tmp_path / "run", "box", "--steps", "1", "--lr", "-1")
    assert commands.run("train_det", arguments) == 1
    assert capsys.readouterr().err == "error: lr: expected a positive number, got -1.0\n"
