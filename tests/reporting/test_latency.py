"""Detectors in turn: the same image for all, stages and detections of measured calls; Amdahl's bound."""

from types import SimpleNamespace

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import StageTiming
from norton_deploy.reporting.latency import macs_ceiling, measure_alternating


class ScriptedPredictor:
    """Pretends that call k takes `times_ms[k]`, and writes down when it was called and with what."""

    def __init__(self, name, times_ms, log, now_s):
        self.name, self.times_ms, self.log, self.now_s = name, iter(times_ms), log, now_s
        self.timing = StageTiming()

    def predict_files(self, paths):
        self.log.append((self.name, paths[0]))
        total_ms = next(self.times_ms)
        self.timing = StageTiming(decode_ms=1.0, infer_ms=total_ms - 1.0)
        self.now_s[0] += total_ms / 1e3
        return [(None, [0] * len(self.name))]


def test_detectors_take_turns_on_the_same_image():
    log: list = []
    now_s = [0.0]
    predictors = {name: ScriptedPredictor(name, range(10, 20), log, now_s) for name in ("a", "bb", "ccc")}
    run = measure_alternating(predictors, ["x", "y"], rounds=3, warm_up=1, clock=lambda: now_s[0])
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 4
    assert all({name for name, _ in one} == {"a", "bb", "ccc"} for one in rounds)
    assert all(len({image for _, image in one}) == 1 for one in rounds)
    assert [one[0][1] for one in rounds[1:]] == ["x", "y", "x"]
    np.testing.assert_allclose(run.times_ms, [[11, 11, 11], [12, 12, 12], [13, 13, 13]])
    summary = run.summary("bb")
    assert summary.detections == 2 and summary.fps == pytest.approx(1000 / 12)
    assert summary.stages_ms["infer_ms"] == 11 and summary.stages_ms["decode_ms"] == 1
    assert list(summary.to_dict())[-3:] == ["fps", "stages_ms", "detections"]
    for nothing in (({}, ["x"]), (predictors, [])):
        with pytest.raises(UserError, match="at least one"):
            measure_alternating(*nothing, rounds=1)


def test_amdahls_bound():
    stages_ms = {"decode": 10.0, "backbone": 60.0, "heads": 30.0}
    assert macs_ceiling(stages_ms, {"backbone": 0.5}) == pytest.approx(100 / 70)
    assert macs_ceiling(stages_ms, {"backbone": 0.0, "heads": 0.0}) == pytest.approx(10)
    assert macs_ceiling(stages_ms, {}) == 1
    with pytest.raises(UserError, match="neck"):
        macs_ceiling(stages_ms, {"neck": 0.5})


def test_stage_macs_follow_layer_names():
    from benchmarks.lib.stages import stage_macs

    names = {"backbone.body.conv1": 5, "backbone.fpn.inner": 7, "rpn.head.conv": 11, "roi_heads.box_head.fc6": 13}
    layers = tuple(SimpleNamespace(name=name, macs=macs) for name, macs in names.items())
    assert stage_macs(SimpleNamespace(layers=layers)) == {"backbone": 5, "fpn_rpn": 18, "heads": 13}
    with pytest.raises(UserError, match="classifier"):
        stage_macs(SimpleNamespace(layers=(SimpleNamespace(name="classifier.fc", macs=1),)))
