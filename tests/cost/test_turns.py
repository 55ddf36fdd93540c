"""Calls in turn on a scripted clock, and statistics of their times against closed forms."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from norton_deploy.cost.turns import Speedup, Turns, balanced_orders, paired_speedup, time_in_turns
from norton_deploy.errors import UserError


def test_every_call_is_timed_once_a_round_in_balanced_order():
    now_s, log = [0.0], []

    def call_of(name, seconds):
        def call(step):
            log.append((step, name))
            now_s[0] += seconds * (1 + max(step, 0))

        return call

    calls = {name: call_of(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    turns = time_in_turns(calls, rounds=6, warm_up=2, clock=lambda: now_s[0])
    assert [step for step, _ in log] == [step for step in range(-2, 6) for _ in calls]
    np.testing.assert_allclose(turns.times_ms, 1e3 * np.outer(np.arange(1, 7), [1, 2, 4]))
    np.testing.assert_allclose(turns.of("b"), 2e3 * np.arange(1, 7))
    assert turns.to_dict() == {name: turns.of(name).tolist() for name in "abc"}
    assert turns.speedup("c", "a").ratio == pytest.approx(4)
    rounds = ["".join(name for at, name in log if at == step) for step in range(6)]
    assert Counter(pair for order in rounds for pair in pairwise(order)) == dict.fromkeys(
        [(x, y) for x in "abc" for y in "abc" if x != y], 2
    )
    left = iter([False, True])
    assert time_in_turns(calls, rounds=9, enough=lambda: next(left)).times_ms.shape == (3, 3)
    for mistake in ({"calls": {}, "rounds": 1}, {"calls": calls, "rounds": 0}):
        with pytest.raises(UserError, match="at least one"):
            time_in_turns(**mistake)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_every_model_follows_every_other_equally_often(count):
    orders = balanced_orders(count)
    assert all(sorted(order) == list(range(count)) for order in orders)
    pairs = Counter(pair for order in orders for pair in pairwise(order))
    assert len(pairs) == count * (count - 1) and len(set(pairs.values())) <= 1
    places = Counter((place, index) for order in orders for place, index in enumerate(order))
    assert len(set(places.values())) == 1


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
    assert clear.to_dict()["verdict"] == clear.verdict


def test_pairing_removes_what_both_models_share():
    drift = np.linspace(1, 3, 30)  # the machine becomes three times slower meanwhile
    speedup = paired_speedup(110 * drift, 100 * drift)
    assert (speedup.ratio, speedup.low, speedup.high) == pytest.approx((1.1, 1.1, 1.1))


def test_summary_is_numpys_percentiles():
    summary = Turns(("m",), np.arange(1.0, 102.0)[:, None]).summary("m")
    assert (summary.p50_ms, summary.p90_ms, summary.p99_ms, summary.samples) == (51, 91, 100, 101)
    assert summary.mean_ms == 51 and summary.spread == pytest.approx(50 / 51)
    assert summary.to_dict()["p50_ms"] == 51
