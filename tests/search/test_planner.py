"""The planner against exhaustive search, and its costs and harms against the real models."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from norton_deploy.compression.channel_groups import PYRAMID_GROUP
from norton_deploy.compression.compress import apply_structure
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.cost.complexity import count_complexity, layer_calls
from norton_deploy.errors import UserError
from norton_deploy.method.plan import DENSE, FORMS, CompressionPlan, Decomposition
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.search.decisions import Decision, list_decisions, to_plan, untouched
from norton_deploy.search.joint_cost import calibrate, joint_cost
from norton_deploy.search.planner import Planner

SETTINGS = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=32),
    roi=RoiSettings(box_features=32, keypoint_channels=(32, 32)),
    image=ImageSettings(64, 64),
)
SIZE = (64, 64)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return SETTINGS.build("keypoint").eval()


@pytest.fixture(scope="module")
def decisions(dense: nn.Module) -> list[Decision]:
    return list_decisions(dense, ranks=(1, 2, 9, 20), fractions=(0.75, 0.5))


def toy_harm(group: str, form: Decomposition, keep: int) -> float:
    """Some fixed numbers that fall with ranks and width and differ between groups."""
    weight = 1 + sum(map(ord, group)) % 7
    return weight * (sum(1 / number for number in form.numbers) + 40 / keep)


def test_coupled_layers_are_one_decision_and_impossible_ranks_are_left_out(decisions: list[Decision]) -> None:
    by_group = {decision.group: decision for decision in decisions}
    assert by_group["backbone.fpn.inner_blocks"].forms == (DENSE,)
    assert by_group[PYRAMID_GROUP].decomposed == tuple(f"backbone.fpn.layer_blocks.{level}.0" for level in range(4))
    pyramid = by_group[PYRAMID_GROUP].forms
    # at ranks 9 and 20 nothing is saved, or eq. 8 is broken
    assert [form.numbers for form in pyramid if form.form == "ranks"] == [(1,), (2,)]
    assert {form.form for form in pyramid} == {"", *FORMS}
    assert by_group[PYRAMID_GROUP].widths == (32, 16)
    assert by_group["backbone.body.layer3"].widths == (256, 192, 128)
    # The stem shares the first stage's residual stream, whose other producers are decomposed.
    assert "backbone.body.conv1" not in by_group["backbone.body.conv1"].decomposed


def test_joint_costs_are_those_of_the_compressed_model(dense: nn.Module, decisions: list[Decision]) -> None:
    calls = layer_calls(dense, SIZE, proposals=10, detections=4)
    macs = joint_cost(dense, calls, "macs")
    choice = {d.group: d.options[(3 * index) % len(d.options)] for index, d in enumerate(decisions)}
    plan = to_plan(choice, decisions, "rcnn")
    small = apply_structure(copy.deepcopy(dense), plan)
    counted = count_complexity(small, SIZE, proposals=10, detections=4)
    assert macs.of_plan(plan) == counted.macs
    assert Planner(decisions, macs, toy_harm).point(choice).cost == counted.macs
    params = joint_cost(dense, calls, "params")
    assert counted.params <= params.of_plan(plan) <= counted.params * 1.05


def test_no_combination_is_better_than_the_plan_by_more_than_the_grid_allows(
    dense: nn.Module, decisions: list[Decision]
) -> None:
    """Three neighbouring groups, all 3 x 8 x 8 combinations tried."""
    names = ("backbone.fpn.inner_blocks", PYRAMID_GROUP, "rpn.head.conv.0.0")
    some = [decision for decision in decisions if decision.group in names]
    cost = joint_cost(dense, layer_calls(dense, SIZE), "macs")
    planner = Planner(some, cost, toy_harm)
    everything = [
        planner.point(dict(zip((d.group for d in some), options, strict=True)))
        for options in itertools.product(*(d.options for d in some))
    ]
    cheapest, dearest = min(point.cost for point in everything), cost.of({}, {})
    for share in (0.1, 0.3, 0.5, 0.8):
        budget = cheapest + share * (dearest - cheapest)
        found = planner.within(budget)
        best = min(point.harm for point in everything if point.cost <= budget)
        assert found.cost <= budget
        assert found.harm <= 1.02 * best
    assert planner.solve(float("inf"), untouched(some)).cost == cheapest
    with pytest.raises(
        UserError,
        match=r"times less than the dense model was asked for, the smallest one considered costs .* ask for no more",
    ):
        planner.within(0.9 * cheapest)
    front = planner.frontier()
    assert [p.harm for p in front] == sorted((p.harm for p in front), reverse=True)
    assert front[-1].cost == dearest


def test_a_budget_that_the_dense_model_keeps_changes_nothing(dense: nn.Module, decisions: list[Decision]) -> None:
    cost = joint_cost(dense, layer_calls(dense, SIZE), "macs")
    point = Planner(decisions, cost, toy_harm).within(cost.of({}, {}))
    assert to_plan(point.choice, decisions, "rcnn") == CompressionPlan("rcnn")


def test_latency_is_calibrated_by_whole_models(dense: nn.Module) -> None:
    calls = layer_calls(dense, SIZE)
    cost = joint_cost(dense, calls, "latency_ms", lambda shape: shape.macs / 1e6)
    plans = [
        CompressionPlan("rcnn"),
        CompressionPlan("rcnn", {"rpn.head.conv.0.0": 1, "backbone.body.layer1.0.conv1": 1}),
        CompressionPlan("rcnn", {}, {PYRAMID_GROUP: 16}),
    ]
    widths = (32, 32, 16)
    truth = [1.25 * cost.of_plan(plan) + 30 + 0.5 * width for plan, width in zip(plans, widths, strict=True)]
    calibrate(cost, list(zip(plans, truth, strict=True)))
    assert (cost.scale, cost.fixed, cost.per_pyramid_channel) == pytest.approx((1.25, 30, 0.5), rel=1e-5)
    for plan, ms in zip(plans, truth, strict=True):
        assert cost.of_plan(plan) == pytest.approx(ms)
    planner = Planner(list_decisions(dense), cost, toy_harm)
    assert planner.point(untouched(planner.decisions)).cost == pytest.approx(truth[0])


def test_a_planned_detector_fits_its_model(dense: nn.Module, decisions: list[Decision]) -> None:
    cost = joint_cost(dense, layer_calls(dense, SIZE), "macs")
    point = Planner(decisions, cost, toy_harm).within(0.4 * cost.of({}, {}))
    plan = to_plan(point.choice, decisions, "rcnn", "test")
    assert fit_plan(dense, plan) == plan
    assert count_complexity(apply_structure(copy.deepcopy(dense), plan), SIZE, detections=100).macs == point.cost


def test_ranks_of_channels_follow_the_kept_widths(dense: nn.Module) -> None:
    decisions = list_decisions(dense, forms=("tucker",), fractions=(0.25,))
    choice = {d.group: d.options[-1 if "layer3" in d.group else 0] for d in decisions}
    wide = {**choice, "backbone.body.layer3.1.conv1": replace(choice["backbone.body.layer3.1.conv1"], keep=256)}
    high = Decomposition("tucker", (96, 96))
    for options in (choice, wide):
        found = {name: replace(o, form=high) if o.form.form else o for name, o in options.items()}
        plan = to_plan(found, decisions, "rcnn")
        assert plan.choose == "harm"
        kept = found["backbone.body.layer3.1.conv1"].keep
        assert plan.tucker["backbone.body.layer3.1.conv1"] == (64, min(96, kept))
        assert plan.tucker["backbone.body.layer3.1.conv2"] == (min(96, kept), 64)
        assert CompressionPlan.from_dict(plan.to_dict()) == plan
