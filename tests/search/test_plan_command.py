"""The command from budget to plan file, on a small classifier."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, save_checkpoint
from norton_deploy.commands import run
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.search.joint_cost import Budget


def test_budgets_are_read_and_bad_ones_refused() -> None:
    assert Budget.parse("speedup=4") == Budget("speedup", 4.0)
    assert Budget.parse("latency_ms=400") == Budget("latency_ms", 400.0)
    assert Budget.parse("macs=0.2") == Budget("macs", 0.2)
    assert str(Budget("speedup", 4.0)) == "speedup=4"
    for wrong in ("macs=1.5", "speed=4", "speedup", "params=-1", "macs=a"):
        with pytest.raises(UserError, match="--budget"):
            Budget.parse(wrong)


@pytest.mark.usefixtures("narrow_resnets")
def test_plan_keeps_its_budget_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    settings = ClassifierSettings("resnet18", 4, image_size=(32, 32))
    header = CheckpointHeader("cls", settings, None, class_categories(["a", "b", "c", "d"]))
    model, out = tmp_path / "model.safetensors", tmp_path / "plan.yaml"
    save_checkpoint(model, settings.build().eval(), header)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    for number in range(3):
        cv2.imwrite(str(tmp_path / "images" / f"{number}.png"), np.roll(pixels, 7 * number, axis=1))
    figures = tmp_path / "figures.json"
    arguments = ["--model", str(model), "--data", str(tmp_path / "images"), "--out", str(out)]
    arguments += ["--forms", "tucker", "--images", "1", "--fit-images", "2"]
    tiny = tmp_path / "tiny.yaml"
    CompressionPlan("resnet18", {}, dict.fromkeys(("conv1", "layer2", "layer3", "layer4"), 1)).save(tiny)
    first = [*arguments, "--budget", "macs=0.4", "--json", str(figures), "--compare", str(tiny)]
    assert run("plan", first) == 0
    result = json.loads(figures.read_text())
    assert 0.3 < result["macs"] / result["dense_macs"] <= 0.4
    assert result["measured_harm"] > 0
    assert result["prediction_error"] == 0
    assert (result["proposals"], result["detections"]) == (0, 0)
    own, below = result["marks"]
    assert own["measured_harm"] == result["measured_harm"]
    assert below["planned_at_equal_cost"] is None  # Nothing considered is as cheap as one channel everywhere.
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert result["stays_dense"]["conv1"] == "the stem is never decomposed"
    assert all((layer["decomposition"] == "dense") == (name in result["stays_dense"]) for name, layer in layers.items())
    assert "chosen by harm" in out.with_suffix(".md").read_text()
    report = out.with_suffix(".md").read_text()
    assert "% of the dense model's MACs, counted." in report
    assert "(plan.png)" in report
    plan = CompressionPlan.load(out)
    assert plan.architecture == "resnet18"
    assert plan.choose == "harm"
    assert plan.keep
    assert "is no prediction of the measured harm" in report and "a short side of 32 pixels" in report
    assert (tmp_path / "plan.png").stat().st_size > 1000

    kept = out.with_suffix(".sensitivity.json").read_text()
    again = [*arguments, "--budget", "params=0.5", "--multiple", "1024", "--resume", "--overwrite"]
    assert run("plan", [*again, "--json", str(figures)]) == 0
    plan, result = CompressionPlan.load(out), json.loads(figures.read_text())
    layers = {layer["name"]: layer for layer in result["layers"]}
    assert plan.tucker
    assert not plan.keep  # no layer has so many filters
    assert plan.choose == "angles"
    assert all(layers[name]["decomposition"].startswith("tucker") for name in plan.tucker)
    assert out.with_suffix(".sensitivity.json").read_text() == kept
    assert run("plan", [*arguments, "--budget", "latency_ms=1", "--overwrite"]) == 1
    assert "measured for detectors" in capsys.readouterr().err
