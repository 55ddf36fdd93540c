"""Statistics of alternating measurements against closed forms."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import StageTiming
from norton_deploy.reporting.latency import (
    AlternatingRun,
    Speedup,
    balanced_orders,
    macs_ceiling,
    measure_alternating,
    paired_speedup,
    summary_to_dict,
)


class ScriptedPredictor:
    """Pretends that call k takes `times_ms[k]`, and writes down when it was called and with what."""

    def __init__(self, name, times_ms, log):
        self.name, self.times_ms, self.log = name, iter(times_ms), log
        self.timing = StageTiming()

    def predict_files(self, paths):
        self.log.append((self.name, paths[0]))
        self.timing = StageTiming(decode_ms=1.0, infer_ms=next(self.times_ms) - 1.0)
        return [(None, [0] * len(self.name))]


def test_models_take_turns_on_the_same_image():
    log: list = []
    predictors = {name: ScriptedPredictor(name, range(10, 20), log) for name in ("a", "bb", "ccc")}
    run = measure_alternating(predictors, ["x", "y"], rounds=3, warm_up=1)
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert len(rounds) == 4
    assert all({name for name, _ in one} == {"a", "bb", "ccc"} for one in rounds)
    assert all(len({image for _, image in one}) == 1 for one in rounds)
    assert [one[0][1] for one in rounds[1:]] == ["x", "y", "x"]
    np.testing.assert_array_equal(run.total_ms, [[11, 11, 11], [12, 12, 12], [13, 13, 13]])
    assert run.summary("bb").detections == 2
    assert run.summary("a").stages_ms["infer_ms"] == 11 and run.summary("a").stages_ms["decode_ms"] == 1
    with pytest.raises(UserError, match="at least one"):
        measure_alternating({}, ["x"], rounds=1)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_model_follows_every_other_equally_often(count):
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1
    places = Counter((place, index) for order in orders for place, index in enumerate(order))
    assert len(set(places.values())) == 1


def test_summary_is_numpys_percentiles():
    times = np.arange(1.0, 102.0)[:, None]
    run = AlternatingRun(("m",), times, (tuple({"infer_ms": float(t)} for t in times[:, 0]),), np.ones((101, 1), int))
    summary = run.summary("m")
    assert (summary.p50_ms, summary.p90_ms, summary.p99_ms, summary.samples) == (51, 91, 100, 101)
    assert summary.fps == pytest.approx(1000 / 51) and summary.spread == pytest.approx(50 / 51)


def test_speedup_is_claimed_only_when_the_interval_excludes_one():
    noise = np.random.default_rng(0).normal(1, 0.02, 40)
    clear = paired_speedup(100 * noise, [50] * 40)
    assert clear.ratio == pytest.approx(2, abs=0.05) and clear.low < clear.ratio < clear.high
    assert clear.verdict.startswith("speed-up 1.99x")
    level = paired_speedup(100 * noise, [100] * 40)
    assert level.low < 1 < level.high and level.verdict.startswith("no speed-up: the interval includes 1")
    slower = paired_speedup([50] * 40, 100 * noise)
    assert slower.verdict.startswith("no speed-up, it is slower")
    # Three lucky pairs agree perfectly and still prove nothing.
    assert paired_speedup([2, 2, 2], [1, 1, 1]).verdict.startswith("no speed-up shown: 3 pairs")
    assert Speedup(1.0, 1.0, 1.0, 50).verdict.startswith("no speed-up")
    assert summary_to_dict(clear)["verdict"] == clear.verdict


def test_pairing_removes_what_both_models_share():
    drift = np.linspace(1, 3, 30)  # the machine becomes three times slower meanwhile
    speedup = paired_speedup(110 * drift, 100 * drift)
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((1.1, 1.1, 1.1))


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
