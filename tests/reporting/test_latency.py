"""Detectors in turn: the same image for all, stages and detections of measured calls."""

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import StageTiming
from norton_deploy.reporting import latency
from norton_deploy.reporting.latency import measure_alternating


class ScriptedPredictor:
    """Pretends that call k takes `times_ms[k]`, and writes down when it was called and with what."""

    overlaps = True

    def __init__(self, name, times_ms, log, now_s):
        self.name, self.times_ms, self.log, self.now_s = name, iter(times_ms), log, now_s
        self.timing = StageTiming()

    def predict_files(self, paths):
        self.log.append((self.name, paths[0]))
        total_ms = next(self.times_ms)
        self.timing = StageTiming(decode_ms=1.0, infer_ms=total_ms - 1.0)
        self.now_s[0] += total_ms / 1e3
        return [(None, [0] * len(self.name))]

    def stream(self, images):
        for _ in images:
            self.now_s[0] += 0.005
            yield []


class PlainPredictor(ScriptedPredictor):
    overlaps = False


def test_detectors_take_turns_on_the_same_image(monkeypatch):
    monkeypatch.setattr(latency, "read_image", lambda path: path)
    log: list = []
    now_s = [0.0]
    kinds = {"a": ScriptedPredictor, "bb": ScriptedPredictor, "ccc": PlainPredictor}
    predictors = {name: kind(name, range(10, 20), log, now_s) for name, kind in kinds.items()}
    run = measure_alternating(predictors, ["x", "y"], rounds=3, warm_up=1, clock=lambda: now_s[0])
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 4
    assert all({name for name, _ in one} == {"a", "bb", "ccc"} for one in rounds)
    assert all(len({image for _, image in one}) == 1 for one in rounds)
    assert [one[0][1] for one in rounds[1:]] == ["x", "y", "x"]
    np.testing.assert_allclose(run.times_ms, [[11, 11, 11], [12, 12, 12], [13, 13, 13]])
    summary = run.summary("bb")
    assert summary.detections == 2 and summary.fps == pytest.approx(1000 / 12)
    assert summary.throughput_fps == pytest.approx(200)
    assert run.summary("ccc").throughput_fps == run.summary("ccc").fps
    assert summary.stages_ms["infer_ms"] == 11 and summary.stages_ms["decode_ms"] == 1
    assert list(summary.to_dict())[-4:] == ["fps", "stages_ms", "detections", "throughput_fps"]
    for nothing in (({}, ["x"]), (predictors, [])):
        with pytest.raises(UserError, match="at least one"):
            measure_alternating(*nothing, rounds=1)
