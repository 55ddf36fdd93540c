"""From a detector to the report on tiny data: every step, killed and gone on with, and the commands that it prints."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import tyro

from norton_deploy.commands import import_detectron2, run
from norton_deploy.config import parse_settings
from norton_deploy.cost.turns import Speedup
from norton_deploy.data.synthetic import CATEGORIES
from norton_deploy.deployment import compare as compare_module
from norton_deploy.deployment import deploy as deploy_module
from norton_deploy.deployment import making, notes
from norton_deploy.deployment.compare import CompareRequest, compare
from norton_deploy.deployment.deploy import deploy
from norton_deploy.deployment.request import DeployRequest, EngineTarget
from norton_deploy.deployment.source_model import import_command, open_source
from norton_deploy.deployment.steps import Steps
from norton_deploy.errors import UserError
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.deployment import Deployment

PLANS = Path(__file__).parents[2] / "configs" / "plans"
PLAN = "architecture: rcnn\nranks:\n  backbone.body.layer4.1.conv2: 1\nkeep:\n  backbone.body.layer4.0.conv1: 64\n"


@pytest.fixture
def own(narrow_resnets: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small torchvision detector of the embedded categories with random weights, as a .pth; and a plan for it."""
    folder = tmp_path_factory.mktemp("own")
    torch.manual_seed(0)
    settings = DetectorSettings(
        num_classes=1 + len(CATEGORIES), backbone=BackboneSettings("resnet18", fpn_channels=16),
        roi=RoiSettings(box_features=16),
    )  # fmt: skip
    torch.save(settings.build("box").state_dict(), folder / "own.pth")
    (folder / "plan.yaml").write_text(PLAN)
    return folder / "own.pth"


def request_for(own: Path, data: Path, out: Path, **changes: Any) -> DeployRequest:
    values = {"task": "box", "model": own, "data": data, "image_size": (128, 128), "quick": True, "images": 2,
              "target": "torch", "refit_images": 2, "batch_size": 1, "plan": own.with_name("plan.yaml")}  # fmt: skip
    return DeployRequest(out=out, **(values | changes))


def check_commands(made: Deployment) -> None:
    """Every printed command is one that its tool understands."""
    for step in made.steps:
        program, name, *words = shlex.split(step.command)
        assert program == "norton"
        parse_settings(import_module(f"norton_deploy.commands.{name}").Settings, words, prog=name, description="")


@pytest.mark.slow
def test_all_steps_and_what_an_interruption_leaves(own: Path, tiny_coco: Path, tmp_path: Path) -> None:
    out, said = tmp_path / "run", list[str]()
    request = request_for(own, tiny_coco, out, finetune_steps=2)

    def stop(line: str) -> None:
        said.append(line)
        if "fine-tune" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        deploy(request, command="tools/deploy.py", report=stop)
    assert not (out / "report.json").exists()
    said.clear()
    made = deploy(request, command="tools/deploy.py", report=said.append)
    repeated = [line for line in said if line.endswith("done already")]
    assert len(repeated) == 5 and "compress the model" in repeated[-1]
    report = json.loads((out / "report.json").read_text())
    assert report["artefact"] == "finetune/last.safetensors" and report["speedup"]["pairs"] == 12
    assert 0 <= report["ap_dense"] <= 1 and 0 <= report["ap_small"] <= 1
    assert (out / "report.html").is_file() and (out / "report.md").is_file()
    assert str(tmp_path) not in report["dense"]["file"] and len(made.training) > 0
    assert made.small.macs is not None and made.dense.macs is not None and made.small.macs < made.dense.macs
    assert any("dense model finds next to nothing" in note for note in report["notes"])
    check_commands(made)
    with pytest.raises(UserError, match=r"speedup = 4\.0, now it is 3"):
        deploy(replace(request, speedup=3), command="", report=said.append)

    both = CompareRequest(model=out / report["artefact"], baseline=out / "model.safetensors", data=tiny_coco,
                          out=tmp_path / "compared", images=2, rounds=2)  # fmt: skip
    compared = compare(both, command="tools/compare.py", report=said.append)
    assert compared.speedup is not None and compared.speedup.pairs == 2
    assert compared.dense.scores["bbox"].metrics == made.dense.scores["bbox"].metrics
    check_commands(compared)


@pytest.mark.slow
def test_a_killed_run_of_the_packaged_detector_goes_on_to_a_checked_graph(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-c", "from norton_deploy.commands import run; import sys; sys.exit(run('deploy'))",
               "--task", "mask", "--quick", "--images", "2", "--out", str(out)]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "latency of the dense model" in line:
            time.sleep(0.2)
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    done = json.loads((out / "deploy.json").read_text())["cells"]
    assert {"export-dense", "ap-dense"} <= done.keys() and "export-small" not in done
    written = (out / "dense.onnx").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("done already") == len(done) and (out / "dense.onnx").stat().st_mtime_ns == written
    report = json.loads((out / "report.json").read_text())
    assert report["ap_dense"] == report["ap_small"] and report["artefact"] == "artefact/model.onnx"
    assert any("compressed already" in note for note in report["notes"])
    assert report["dense"]["name"] == "the same without factors"
    assert (out / "artefact" / "python" / "detect.py").is_file()
    check_commands(Deployment.from_json(out / "report.json"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model or --task"),
        ("--model own.pth", "--data: needed with --model"),
        ("--model c.yaml --data d", "--weights: goes with Detectron2's configuration"),
        ("--task mask --speedup 1", "--speedup: expected more than 1, got 1"),
        ("--task mask --target tensorflow", "--target tensorflow: expected one of onnxruntime"),
        ("--task mask --target torch:86", "--target torch:86: expected one of"),
        ("--task box", "--task box: no packaged detector"),
        ("--model nothing.pth --data d", "--model nothing.pth: no such file"),
        ("--task mask --data d", "d/annotations/instances_train2017.json: not found; expected COCO's layout in d"),
        (
            f"--model {__file__} --data d",
            f"--model {__file__}: expected a checkpoint (.safetensors), torchvision's",
        ),
        ("--task mask --images 0", "--images: expected at least 1, got 0"),
    ],
)
def test_mistakes(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("deploy", [*arguments.split(), "--out", str(tmp_path / "run")]) == 1
    assert f"error: {message}" in capsys.readouterr().err


def test_what_does_not_fit_the_model_is_refused_first(
    own: Path, tiny_coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = str(PLANS / "balanced.yaml")
    known = ["--model", str(own), "--data", str(tiny_coco), "--out", str(tmp_path / "run")]
    assert run("deploy", [*known, "--plan", plan]) == run("deploy", [*known, "--task", "keypoint"]) == 1
    said = capsys.readouterr().err
    assert f"error: {plan}: keep: 'backbone.body.layer1' has" in said
    assert f"error: {own}: a detector for task 'box', --task is 'keypoint'" in said and "check the data" not in said


def test_a_second_deployment_into_one_folder_is_kept_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hold = (
        "import sys, time; from pathlib import Path; from norton_deploy.folder_lock import held\n"
        "with held(Path(sys.argv[1]), 'deploys here'): print('held', flush=True); time.sleep(120)"
    )
    words = [sys.executable, "-c", hold, str(tmp_path / "run" / "deploy.lock")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        assert run("deploy", ["--task", "mask", "--quick", "--out", str(tmp_path / "run")]) == 1
        process.kill()
    assert (
        f"run: process {process.pid} on " in (said := capsys.readouterr().err) and "deploys here; wait for it" in said
    )
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["deploy.lock"]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, lambda *_, **__: signal.raise_signal(signal.SIGTERM)])
def test_a_stop_says_how_to_go_on(
    stop: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("norton_deploy.commands.deploy.deploy", mock.Mock(side_effect=stop))
    assert run("deploy", ["--task", "mask", "--out", str(tmp_path)]) == 130
    assert f"{tmp_path}: stopped; the same line goes on where it was\ninterrupted" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.parametrize(
    ("target", "precision", "engine"),
    [
        ("openvino", "int8", "openvino-int8"), ("onnxruntime", "int8", "onnxruntime-int8"),
        ("openvino", "fp32", "openvino"), ("tensorrt-rtx:86", "int8", "onnxruntime"), ("torch", "int8", "onnxruntime"),
    ],
)  # fmt: skip
def test_8_bits_are_planned_for_and_calibrated_on_training_images(target: str, precision: Any, engine: str) -> None:
    request = DeployRequest(task="mask", out=Path("o"), target=target, precision=precision)
    assert making.timed_engine(EngineTarget.parse(target), precision) == engine
    options = making.export_options(request, (96, 96), Path("d"), multiplied_out=False)
    command = making.export_command(Path("m.safetensors"), Path("m.onnx"), options, Path("d"), 2, None)
    assert ("--calibration d/train2017" in command) == (precision == "int8")
    assert (options.precision, options.calibration is None) == (precision, precision != "int8")


def test_the_printed_import_of_a_detectron2_model_names_the_categories_and_the_size() -> None:
    request = DeployRequest(model=Path("c.yaml"), weights=Path("w.pkl"), data=Path("d"), out=Path("o"),
                            image_size=(320, 480))  # fmt: skip
    command = import_command(request, Path("c.yaml"), Path("d/annotations/a.json"), Path("o/model.safetensors"))
    program, name, *words = shlex.split(command)
    read = tyro.cli(import_detectron2.Settings, args=words)
    assert (program, name) == ("norton", "import_detectron2") and read.image_size == (320, 480)
    assert (read.config, read.weights, read.annotations) == (
        Path("c.yaml"),
        Path("w.pkl"),
        Path("d/annotations/a.json"),
    )
    mine = import_command(replace(request, model=Path("m.pth"), weights=None), Path("m.pth"), Path("a.json"), Path("o"))
    assert shlex.split(mine)[2:] == [
        "--model",
        "m.pth",
        "--out",
        "o",
        "--categories",
        "a.json",
        "--image-size",
        "320",
        "480",
    ]


def test_the_task_of_a_pth_says_which_annotations_are_its(tiny_coco: Path, tmp_path: Path) -> None:
    settings = DetectorSettings(num_classes=2, backbone=BackboneSettings("resnet18", fpn_channels=16))
    torch.save(settings.build("keypoint").state_dict(), tmp_path / "own.pth")
    (tmp_path / "data" / "annotations").mkdir(parents=True)
    kept = [*tiny_coco.glob("*2017"), *tiny_coco.glob("annotations/person_keypoints_*")]
    for path in kept:
        (tmp_path / "data" / path.relative_to(tiny_coco)).symlink_to(path)
    request = DeployRequest(model=tmp_path / "own.pth", data=tmp_path / "data", out=tmp_path / "run")
    header = open_source(request, tmp_path / "own.pth").header
    assert header.task == "keypoint" and header.categories.names == ("person",)


def test_a_short_fine_tuning_is_logged_often_enough_for_its_curve() -> None:
    for steps, every in ((2, 1), (90, 3), (2000, 10)):
        request = DeployRequest(task="mask", out=Path("o"), finetune_steps=steps)
        settings = making.finetune_settings(request, "mask", *(Path(name) for name in ("d", "s", "t", "o")))
        assert settings.log_every == every


def test_two_files_of_one_name_have_their_folders_in_the_report() -> None:
    named = compare_module.names_of
    assert named(Path("a/m.onnx"), Path("b/n.onnx")) == ("m.onnx", "n.onnx")
    assert named(Path("a/x/m.onnx"), Path("b/x/m.onnx")) == ("a/x/m.onnx", "b/x/m.onnx")
    assert named(Path("m.onnx"), Path("m.onnx")) == ("m.onnx", "m.onnx (itself)")


def test_targets() -> None:
    rtx = EngineTarget.parse("tensorrt-rtx:86")
    assert (rtx.backend, rtx.graph, rtx.engine, rtx.compute_capability) == (
        "onnxruntime", "tensorrt", "tensorrt-rtx", "86",
    )  # fmt: skip
    assert EngineTarget.parse("openvino").backend == "openvino"
    assert EngineTarget.parse("torch").graph is None


def test_an_impossible_budget_is_refused_before_anything_long(own: Path, tiny_coco: Path, tmp_path: Path) -> None:
    request, said = request_for(own, tiny_coco, tmp_path / "run", plan=None, speedup=5000.0, images=1), list[str]()
    with pytest.raises(UserError, match=r"5000 times less than the dense model was asked for, the smallest one"):
        deploy(request, command="", report=said.append)
    assert "take the model in" in "".join(said) and "AP of the dense model" not in "".join(said)


def test_a_missed_speedup_says_why_and_what_to_do() -> None:
    asked = DeployRequest(task="mask", out=Path("o"), speedup=3, quick=True)
    reached = Speedup(1.93, 1.88, 1.95, 12)
    counted = notes.why_missed(asked, {"macs": 1}, reached)
    assert "made for 33 % of the MACs" in counted and "leave --quick out" in counted and "--speedup 4.7." in counted
    assert "--speedup 13.3." in notes.why_missed(replace(asked, speedup=4), {"macs": 1}, Speedup(1.2, 1.1, 1.3, 12))
    assert "--quick" not in notes.why_missed(replace(asked, target="tensorrt-rtx:86"), {}, reached)
    timed = notes.why_missed(replace(asked, quick=False), {"measured_speedup": 2.9}, reached)
    assert "2.90 times then, 1.93 now" in timed
    assert "not fine-tuned" in notes.quick_plan(asked) and "1 image;" in notes.quick_plan(asked)
    assert "fine-tuned for 20 steps only" in notes.quick_plan(replace(asked, finetune_steps=20))
    assert notes.quick_plan(replace(asked, plan=Path("p.yaml"))) == "The small model was not fine-tuned."


@pytest.mark.parametrize(
    ("built", "measured", "ships", "note"),
    [
        ({"built": True, "ran": True, "reason": ""}, "artefact/model.engine", "artefact/model.engine", ""),
        ({"built": True, "ran": False, "reason": ""}, "small.onnx", "artefact/model.engine", notes.NOT_RUN),
        ({"built": False, "ran": False, "reason": "no GPU here"}, "artefact/model.onnx", "artefact/model.onnx",
         "The engine was not built here (no GPU here): the artefact is its graph"),
    ],
)  # fmt: skip
def test_what_is_measured_of_an_engine(
    built: dict[str, Any], measured: str, ships: str, note: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = deploy_module._Run.__new__(deploy_module._Run)
    made.out, made.target, made.notes, made.report = tmp_path, EngineTarget.parse("tensorrt"), [], print
    made.request = DeployRequest(task="mask", out=tmp_path)
    made.steps = Steps(tmp_path, {}, count=1, report=print)
    written = mock.Mock()
    monkeypatch.setattr(deploy_module, "write_artefact", written)
    monkeypatch.setattr(making, "build_engine_of", lambda *_: built)
    monkeypatch.setattr(made, "_graph", lambda *_, **__: (tmp_path / "small.onnx", {"passed": True}))
    _, artefact, run = made._export(tmp_path / "small.safetensors")
    assert (run, artefact) == (tmp_path / measured, tmp_path / ships)
    assert written.call_args.args[1].name == ("small.engine" if built["built"] else "small.onnx")
    assert made.notes[0].startswith(note) if note else not made.notes


@pytest.mark.parametrize(
    ("target", "here", "runs"),
    [
        ("tensorrt", "90", True), ("tensorrt", None, False), ("tensorrt-rtx:86", "90", False),
        ("tensorrt-rtx:86", "86", True), ("onnxruntime", "90", False),
    ],
)  # fmt: skip
def test_the_dense_model_becomes_an_engine_where_engines_run(
    target: str, here: str | None, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("norton_deploy.deployment.request.local_capability", lambda: here)
    assert EngineTarget.parse(target).runs_here == runs
