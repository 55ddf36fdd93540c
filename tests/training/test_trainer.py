import json
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from tiny_run import cross_entropy, tiny_model, tiny_settings, tiny_trainer
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.errors import UserError
from norton_deploy.training.run_folder import RunFolder
from norton_deploy.training.run_log import RunLog
from norton_deploy.training.trainer import Evaluation, NonFiniteLossError


def read_log(out: Path, section: str) -> list[dict]:
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["section"] == section]


def test_sgd_step_equals_the_formula(tmp_path):
    """One step with momentum, weight decay on the matrix only and clipping, worked out by hand."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    settings = tiny_settings(tmp_path, steps=1, lr=0.1, warmup_steps=0, clip_norm=0.05, weight_decay=0.2)
    trainer = tiny_trainer(settings, model=model)
    batch = next(iter(trainer.loader.batches(0, 0)))
    features = batch.images.flatten(1)
    probabilities = (features @ weight.T + bias).softmax(1)
    error = (probabilities - nn.functional.one_hot(batch.targets, 4)) / 4
    gradients = [error.T @ features, error.sum(0)]
    norm = float(torch.cat([g.flatten() for g in gradients]).norm())
    assert norm > 0.05
    trainer.run()
    scale = 0.05 / norm
    torch.testing.assert_close(model[1].weight, weight - 0.1 * (scale * gradients[0] + 0.2 * weight))
    torch.testing.assert_close(model[1].bias, bias - 0.1 * scale * gradients[1])
    assert read_log(tmp_path, "train")[0]["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_frozen_normalisation_stays_frozen(tmp_path):
    frozen = FrozenBatchNorm2d(3)
    model = nn.Sequential(frozen, tiny_model())
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    tiny_trainer(tiny_settings(tmp_path), model=model).run()
    assert all(torch.equal(tensor, before[name]) for name, tensor in frozen.state_dict().items())


def test_best_checkpoint_is_of_the_best_evaluation(tmp_path):
    scores = iter([0.2, 0.7, 0.4])

    def evaluate(model: nn.Module) -> Evaluation:
        assert not model.training
        score = next(scores)
        return Evaluation({"quality": {"score": score}}, score)

    saved: dict[str, list[int]] = {"last": [], "best": []}
    trainer = tiny_trainer(tiny_settings(tmp_path), evaluate=evaluate)
    trainer.save_model = lambda path, model: saved[path.stem].append(trainer.step)
    result = trainer.run()
    assert (result.steps, result.best, result.metrics) == (15, 0.7, {"quality": {"score": 0.4}})
    assert saved == {"last": [6, 12, 15], "best": [6, 12]}
    assert [line["quality"]["score"] for line in read_log(tmp_path, "evaluation")] == [0.2, 0.7, 0.4]


def test_log_lines(tmp_path):
    tiny_trainer(tiny_settings(tmp_path, log_every=4, lr=0.05)).run()
    lines = read_log(tmp_path, "train")
    assert [line["step"] for line in lines] == [4, 8, 12, 15]  # a line's interval ends with the epoch
    for line in lines:
        assert {"epoch", "lr", "losses", "gradient_norm", "images_per_s", "memory_mib"} < line.keys()
        assert line["losses"]["total"] == line["losses"]["classification"]
        assert line["images_per_s"] > 0 and line["memory_mib"] > 0
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_log_line_cut_off_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"section": "train", "step": 1}\n{"section": "train", "step": 3}\n{"section": "tr')
    with RunLog(RunFolder(tmp_path), first_step=2, evaluated_step=2, enabled=True) as log:
        log.write("train", 3, {"lr": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 3]


class FakeRun(list):
    """A run of trackio, as far as accelerate's tracker uses it."""

    def log(self, values, step):
        if len(self) >= 5:
            raise ValueError("the server is gone")
        self.append((step, values))

    def finish(self):
        self.append("finished")


def fake_trackio(monkeypatch, start):
    module = ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None)
    module.init, module.config = start, mock.Mock()
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def test_a_tracker_gets_the_numbers_of_the_log_and_its_failure_stops_nothing(tmp_path, monkeypatch):
    run, started = FakeRun(), []
    trackio = fake_trackio(monkeypatch, lambda **values: started.append(values) or run)
    tiny_trainer(tiny_settings(tmp_path / "mine", steps=3, log_every=1, tracker="trackio")).run()
    assert started == [{"project": "norton_deploy", "name": "mine"}]
    assert trackio.config.update.call_args.args[0]["batch_size"] == 4
    [first, *_, evaluation, finished] = run
    line = read_log(tmp_path / "mine", "train")[0]
    assert first == (1, first[1]) and first[1]["train/losses/total"] == line["losses"]["total"]
    assert evaluation[1]["evaluation/weights/sum"] < 1e9 and finished == "finished"
    assert not (tmp_path / "mine" / "tensorboard").exists()
    with pytest.warns(UserWarning, match=r"trackio failed \(the server is gone\); the run goes on"):
        tiny_trainer(tiny_settings(tmp_path / "again", steps=3, log_every=1, tracker="trackio")).run()
    assert len(read_log(tmp_path / "again", "train")) == 3


def test_a_tracker_that_is_not_there_or_does_not_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--tracker wandb: the package wandb is not installed; pip install wandb"):
        tiny_settings(tmp_path, tracker="wandb")
    fake_trackio(monkeypatch, mock.Mock(side_effect=RuntimeError("no login,\nno network")))
    with pytest.raises(UserError, match=r"--tracker trackio: cannot be started \(no login, no network\)"):
        tiny_trainer(tiny_settings(tmp_path, tracker="trackio")).run()


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_numbers_stop_the_run_and_name_the_images(tmp_path, where):
    def loss_terms(model, batch):
        terms = cross_entropy(model, batch)
        if trainer.step == 5 and where == "loss":
            terms["box"] = terms["classification"] * float("nan")
        if trainer.step == 5 and where == "gradient":
            terms["box"] = (model[0].weight.sum() * 0).sqrt()  # 0, with an infinite slope
        return terms

    trainer = tiny_trainer(tiny_settings(tmp_path), loss_terms=loss_terms)
    with pytest.raises(NonFiniteLossError, match="step 5: ") as error:
        trainer.run()
    report = json.loads((tmp_path / "non_finite.json").read_text())
    expected = next(batch.image_ids for batch in trainer.loader.batches(0, 5))
    assert report["step"] == 5
    assert report["processes"][0]["image_ids"] == expected
    assert all(str(image_id) in str(error.value) for image_id in expected)
    names = {name for name, value in report["processes"][0]["losses"].items() if value in ("nan", "inf")}
    assert names == ({"box", "total"} if where == "loss" else {"gradient_norm"})
    assert torch.isfinite(trainer.bare_model[0].weight).all()


@pytest.fixture
def own_accelerator():
    """Accelerate keeps one precision for a whole process: forget it before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("own_accelerator")
def test_mixed_precision_trains_in_half_and_evaluates_in_float32(tmp_path):
    model = tiny_model()
    seen: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    model[0].register_forward_hook(lambda layer, _inputs, output: seen[layer.training].add(output.dtype))

    def evaluate(trained: nn.Module) -> Evaluation:
        trained(torch.zeros(1, 3, 8, 8))
        return Evaluation({"quality": {"score": 0.0}}, 0.0)

    settings = tiny_settings(tmp_path, steps=2, precision="bf16")
    tiny_trainer(settings, model=model, evaluate=evaluate).run()
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}
