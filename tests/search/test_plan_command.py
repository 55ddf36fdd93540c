"""The command from budget to plan file, on a small classifier."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from norton_deploy.checkpoint import CheckpointHeader, class_categories, save_checkpoint
from norton_deploy.commands import run
from norton_deploy.commands.plan import parse_budget
from norton_deploy.errors import UserError
from norton_deploy.modeling.classifiers import ClassifierSettings, build_dense_classifier
from norton_deploy.planning.plan import CompressionPlan


def test_budgets_are_read_and_bad_ones_refused() -> None:
    assert parse_budget("speedup=4") == ("speedup", 4.0)
    assert parse_budget("latency_ms=400") == ("latency_ms", 400.0)
    assert parse_budget("macs=0.2") == ("macs", 0.2)
    for wrong in ("macs=1.5", "speed=4", "speedup", "params=-1", "macs=a"):
        with pytest.raises(UserError, match="--budget"):
            parse_budget(wrong)


def test_plan_keeps_its_budget_and_resumes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    settings = ClassifierSettings("resnet18", 4, image_size=(32, 32))
    header = CheckpointHeader("cls", settings, None, class_categories(["a", "b", "c", "d"]))
    model, out = tmp_path / "model.safetensors", tmp_path / "plan.yaml"
    save_checkpoint(model, build_dense_classifier(settings).eval(), header)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "image.png"), pixels)
    figures = tmp_path / "figures.json"
    arguments = ["--model", str(model), "--data", str(tmp_path / "image.png"), "--out", str(out), "--ranks", "1"]
    first = [*arguments, "--budget", "macs=0.4", "--json", str(figures), "--picture", str(tmp_path / "front.png")]
    assert run("plan", first) == 0
    result = json.loads(figures.read_text())
    assert 0.3 < result["macs"] / result["dense_macs"] <= 0.4
    assert result["measured_harm"] > 0
    plan = CompressionPlan.load(out)
    assert plan.architecture == "resnet18"
    assert plan.ranks
    assert plan.keep
    assert (tmp_path / "front.png").stat().st_size > 1000

    kept = out.with_suffix(".sensitivity.json").read_text()
    assert run("plan", [*arguments, "--budget", "params=0.5", "--resume"]) == 0
    assert out.with_suffix(".sensitivity.json").read_text() == kept
    assert run("plan", [*arguments, "--budget", "latency_ms=1"]) == 1
    assert "measured for detectors" in capsys.readouterr().err
