"""The Table III benchmark: resuming, equal work, calibrated random weights."""

import json
from dataclasses import replace

import pytest
import torch

from benchmarks import table3
from benchmarks.lib.stages import STAGES
from benchmarks.lib.table3_report import AUTHORS_ORT, DENSE_EAGER, DENSE_ORT, NORTON_EAGER, NORTON_ORT
from norton_deploy.errors import UserError
from norton_deploy.inference.torch_backend import TorchPredictor

MODELS = (DENSE_EAGER, NORTON_EAGER, DENSE_ORT, NORTON_ORT, AUTHORS_ORT)


def invented(task, settings):
    """A measurement with round numbers; only its form is real."""
    latency = {
        "samples": 9,
        "p50_ms": 50.0,
        "p90_ms": 60.0,
        "p99_ms": 70.0,
        "spread": 0.1,
        "fps": 20.0,
        "detections": 10.0,
    }
    split = {"stages_ms": dict.fromkeys(STAGES, 5.0), "method": "invented", "proposals": 100.0}
    return {
        "images": "8 synthetic scenes, not photographs",
        "weights": "none",
        "device": dict.fromkeys(MODELS, "nowhere"),
        "latency": dict.fromkeys(MODELS, latency),
        "stages": dict.fromkeys(MODELS, split),
        "complexity": {"dense": {"macs": 2e9, "params": 4e6}, "norton": {"macs": 1e9, "params": 1e6}},
        "speedup": [{"baseline": DENSE_ORT, "candidate": NORTON_ORT, "verdict": "no speed-up: invented"}],
        "macs_ceiling": {DENSE_ORT: 2.0},
    }


def test_finished_tasks_are_kept_and_other_settings_refused(monkeypatch, tmp_path):
    measured = []

    def measure(task, settings):
        if measured == ["box"]:
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append(task)
        return invented(task, settings)

    monkeypatch.setattr(table3, "measure_task", measure)
    out = tmp_path / "table3.json"
    settings = table3.Settings(image_size=(64, 64), out=out, work=tmp_path / "work", small=True)
    with pytest.raises(KeyboardInterrupt):
        table3.main(settings)
    assert list(json.loads(out.read_text())["cells"]) == ["box"]
    assert table3.main(settings) == 0
    assert measured == ["box", "killed", "mask", "keypoint"]
    results = json.loads(out.read_text())
    assert list(results["cells"]) == ["box", "mask", "keypoint"]
    assert all(task["provenance"]["versions"]["torch"] for task in results["cells"].values())
    markdown, page = out.with_suffix(".md").read_text(), out.with_suffix(".html").read_text()
    for text in ("no speed-up: invented", "1.00G (50)", "1.00M (75)", "RTX 3060", "synthetic scenes, not photographs"):
        assert text in markdown and text in page
    assert markdown.count("paper, RTX 3060") == 6
    with pytest.raises(UserError, match="measured with rounds = 12, now it is 5"):
        table3.main(replace(settings, rounds=5))
    with pytest.raises(UserError, match="belong together"):
        table3.main(replace(settings, model=tmp_path / "x.safetensors"))


def test_random_models_do_equal_work(tmp_path):
    settings = table3.Settings(image_size=(96, 96), small=True, proposals=60, detections=7, work=tmp_path)
    images, images_are = settings.prepare_images(settings.work)
    assert images_are == "8 synthetic scenes, not photographs"
    dense, norton, categories = table3.random_pair("box", settings, images)
    work = {}
    for name, model in (("dense", dense), ("norton", norton)):
        proposals: list[int] = []
        model.rpn.register_forward_hook(lambda _m, _i, output, seen=proposals: seen.append(len(output[0][0])))
        found = [len(one) for _, one in TorchPredictor(model, "box", categories, device="cpu").predict_files(images)]
        work[name] = (set(proposals), set(found))
        features = model.backbone(torch.rand(1, 3, 96, 96))
        # Calibrated: activations neither vanish nor explode on the way through fifty layers.
        assert all(1e-3 < value.std() < 1e3 for value in features.values())
    assert work["dense"] == work["norton"] == ({60}, {7})
    assert settings.complexity(norton).macs < settings.complexity(dense).macs
