"""benchmarks/cifar_gpu.py on a CPU with eight images: its cells, its resuming, its loss."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from benchmarks import cifar_gpu
from benchmarks.lib.cifar_experiment import z_scores
from tests.class_images import write_class_images


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of four 32 x 32 images in train/ and test/."""
    return write_class_images(tmp_path / "images", {"train": 4, "test": 4}, {"cat": None, "dog": None})


def test_a_cell_that_learnt_nothing_is_an_error_with_its_figures() -> None:
    figures = {"top1": 0.1, "epochs": 3}
    found = cifar_gpu.guarded(lambda seconds, epochs: figures, 1.0, None, 0.12)
    assert found == {"error": "stayed at chance: top-1 10.00 % after training", "figures": figures}
    assert cifar_gpu.guarded(lambda seconds, epochs: figures | {"top1": 0.3}, 1.0, None, 0.12)["top1"] == 0.3


@pytest.mark.slow
def test_it_runs_resumes_and_repeats_what_failed(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, state = tmp_path / "cifar.json", tmp_path / "state"
    settings = cifar_gpu.Settings(data=images, out=out, state=state, device="cpu", smoke=True, workers=0)

    def run() -> dict[str, dict[str, Any]]:
        cifar_gpu.main(settings)
        return json.loads(out.read_text())["cells"]

    def fail(*_: object) -> None:
        raise RuntimeError("no luck")

    with monkeypatch.context() as patched:
        patched.setattr(cifar_gpu, "measure_rank", fail)
        cells = run()
    assert cells["rank 1"] == cells["rank 1"] | {"error": "RuntimeError: no luck"}
    assert [name for name, cell in cells.items() if "error" not in cell] == [
        "dense",
        "vgg16_88",
        "vgg16_99",
        "vgg16_99, distilled, standardised, T = 2",
        "vgg16_99, second seed",
    ]
    assert cells["vgg16_99"]["params"] == 142_231 - 8 * 122 - 8  # two classes instead of ten
    assert cells["vgg16_99"]["images_seen"] == 8
    assert "vgg16_99, second seed" in out.with_suffix(".md").read_text()

    again = run()
    assert 0 < again["rank 1"]["nmse_total"] < 1
    del again["rank 1"], cells["rank 1"]
    assert again == cells  # nothing else was measured again
    for file in state.glob("vgg16_88*"):
        file.unlink()
    third = run()
    assert third["vgg16_99"] == cells["vgg16_99"]
    assert third["vgg16_88"]["provenance"]["date"] != cells["vgg16_88"]["provenance"]["date"]


def test_a_cell_without_time_is_left_to_the_next_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cifar.json"
    monkeypatch.setattr(cifar_gpu, "measure_dense", lambda *_: pytest.fail("no time for it"))
    cifar_gpu.main(cifar_gpu.Settings(data=images, out=out, device="cpu", budget=0, workers=0))
    assert not out.exists()


def test_loss_of_a_recipe() -> None:
    torch.manual_seed(0)
    student, teacher, labels = torch.randn(6, 10), torch.randn(6, 10), torch.randint(0, 10, (6,))
    hard = functional.cross_entropy(student, labels, label_smoothing=0.1)
    assert torch.equal(cifar_gpu.Recipe(weight=0).loss(student, labels, teacher), hard)
    soft = 4 * functional.kl_div(
        functional.log_softmax(student / 2, 1), functional.softmax(teacher / 2, 1), reduction="batchmean"
    )
    found = cifar_gpu.Recipe(weight=0.3, temperature=2.0).loss(student, labels, teacher)
    torch.testing.assert_close(found, 0.7 * hard + 0.3 * soft)
    standardised = cifar_gpu.Recipe(weight=1, temperature=2.0, standardised=True)
    torch.testing.assert_close(
        standardised.loss(student, labels, teacher), standardised.loss(5 * student + 1, labels, 0.1 * teacher - 2)
    )
    centred = student.numpy() - student.mean(1, keepdim=True).numpy()
    np.testing.assert_allclose(z_scores(student), centred / student.numpy().std(1, ddof=1, keepdims=True), atol=1e-5)
