"""Plans: YAML in and out, and mistakes that name the layer."""

from dataclasses import replace
from pathlib import Path

import pytest

from norton_deploy.compression.compress import apply_structure
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.errors import UserError
from norton_deploy.method.plan import DENSE, CompressionPlan, Coupling, Decomposition
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import Task

PLANS = Path(__file__).parents[2] / "configs" / "plans"
RESNET50 = ClassifierSettings("resnet50").build()


def test_round_trip(tmp_path: Path) -> None:
    plan = CompressionPlan("resnet50", {"layer1.0.conv2": 2}, {"layer1": 200}, "why")
    plan.save(tmp_path / "plan.yaml")
    assert CompressionPlan.load(tmp_path / "plan.yaml") == plan
    assert "choose" not in plan.to_dict()  # the paper's choice
    assert "first" not in plan.to_dict()
    harm = replace(plan, choose="harm", first="prune")
    harm.save(tmp_path / "harm.yaml")
    assert CompressionPlan.load(tmp_path / "harm.yaml") == harm


def test_decompositions_are_the_sections_of_a_plan() -> None:
    forms = {
        "a": Decomposition("ranks", (2,)),
        "b": Decomposition("coupled", (4, 16)),
        "c": Decomposition("tucker", (8, 24)),
        "d": Decomposition("layer_cp", (32,)),
        "e": DENSE,
    }
    plan = CompressionPlan("rcnn", {"gone": 1}, {"group": 3}).with_decompositions(forms)
    assert plan == CompressionPlan(
        "rcnn", {"a": 2}, {"group": 3}, coupled={"b": Coupling(4, 16)}, tucker={"c": (8, 24)}, layer_cp={"d": 32}
    )
    assert {name: plan.decomposition(name) for name in forms} == forms
    assert str(forms["c"].clipped(6, 16)) == "tucker 6 16"
    assert str(forms["b"].clipped(3, 16)) == "coupled 3 16"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ranks: {}", "'architecture' is missing"),
        ("architecture: resnet50\nrank: {}", "unknown key 'rank'"),
        ("architecture: resnet50\nchoose: luck", "choose: expected angles or harm, found 'luck'"),
        ("architecture: resnet50\nfirst: nothing", "first: expected decompose or prune, found 'nothing'"),
        ("architecture: resnet50\nranks: {layer1.0.conv2: 0}", "layer 'layer1.0.conv2': expected at least 1"),
        ("architecture: resnet50\nkeep: {layer1: 1.5}", "'layer1': expected a whole number"),
        ("architecture: resnet50\nkeep: {layer1: true}", "'layer1': expected a whole number"),
    ],
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        CompressionPlan.load(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CompressionPlan("resnet50", {"layer9.0.conv2": 1}), "unknown layer 'layer9.0.conv2'; did you mean"),
        (CompressionPlan("resnet50", {"layer1.0.conv2": 10}), "'layer1.0.conv2': rank 10 is above its maximum 9"),
        (CompressionPlan("resnet50", {"layer1.0.conv1": 1}), "'layer1.0.conv1' cannot be decomposed"),
        (CompressionPlan("resnet50", {}, {"layer1": 257}), "'layer1' has 256 filters, cannot keep 257"),
        (CompressionPlan("resnet50", {}, {"layer1.0.conv3": 8}), "unknown group 'layer1.0.conv3'"),
        (CompressionPlan("vgg16_bn", {"features.0": 1}), "unknown layer 'features.0'"),
    ],
)
def test_a_plan_that_does_not_fit_names_the_layer(plan: CompressionPlan, message: str) -> None:
    with pytest.raises(UserError) as caught:
        fit_plan(RESNET50, plan)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "gigamacs", "million_parameters"),
    [
        ("resnet50_2.32g", 2.32, 14.51),
        ("resnet50_2.08g", 2.08, 13.51),
        ("resnet50_1.49g", 1.49, 10.52),
        ("table3", 0.92, 5.88),
    ],
)
def test_plans_meet_the_published_levels(name: str, gigamacs: float, million_parameters: float) -> None:
    model = apply_structure(ClassifierSettings("resnet50").build(), CompressionPlan.load(PLANS / f"{name}.yaml"))
    count = count_complexity(model, (224, 224))
    dense = count_complexity(RESNET50, (224, 224))
    assert abs(count.macs - gigamacs * 1e9) / dense.macs < 0.01
    assert abs(count.params - million_parameters * 1e6) / dense.params < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("task", ["box", "mask", "keypoint"])
def test_plans_over_whole_detectors_fit_every_task(task: Task) -> None:
    plans = {path.stem: CompressionPlan.load(path) for path in PLANS.glob("*.yaml")}
    whole = {name: plan for name, plan in plans.items() if plan.architecture == "rcnn"}
    assert {"balanced", "fast"} <= whole.keys()
    counts = {"dense": count_complexity(DetectorSettings().build(task), (256, 256), detections=100).macs}
    for name, plan in whole.items():
        small = apply_structure(DetectorSettings().build(task), plan)
        counts[name] = count_complexity(small, (256, 256), detections=100).macs
        head = getattr(small.roi_heads, f"{task}_head")
        factored = ("CPDBlock", "FactoredConv")
        if not name.startswith("mixed"):  # those leave to the planner what becomes of a head
            assert any(type(module).__name__ in factored for module in head.modules()) == (task != "box")
    assert counts["fast"] < counts["balanced"] < counts["dense"]
    assert counts["mixed_fastest"] < counts["mixed_fast"] < counts["mixed_balanced"] < counts["dense"]


def test_shared_forms_round_trip_and_old_plans_stay_as_they_were(tmp_path: Path) -> None:
    plan = CompressionPlan(
        "vgg16_bn",
        {"features.0": 1},
        coupled={"features.3": Coupling(8, 4)},
        tucker={"features.7": (24, 32)},
        layer_cp={"features.10": 60},
    )
    plan.save(tmp_path / "plan.yaml")
    assert CompressionPlan.load(tmp_path / "plan.yaml") == plan
    assert plan.decomposed == ("features.0", "features.3", "features.7", "features.10")
    prefixed = plan.with_prefix("rcnn", "a.")
    assert prefixed.tucker == {"a.features.7": (24, 32)} and prefixed.within_prefix("vgg16_bn", "a.") == plan
    assert set(CompressionPlan("resnet50", {"layer1.0.conv2": 1}).to_dict()) == {
        "architecture",
        "note",
        "ranks",
        "keep",
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tucker: {a: 3}", "tucker: expected two whole numbers for each layer"),
        ("tucker: {a: [3, 0]}", "tucker: layer 'a': expected at least 1"),
        ("coupled: {a: {rank: 2}}", "coupled: expected rank and clusters, whole numbers for each layer"),
        ("coupled: {a: {rank: 2, clusters: many}}", "coupled: layer 'a': expected rank and clusters"),
        ("layer_cp: {a: 3}\nranks: {a: 1}", "layer 'a' is in both 'ranks' and 'layer_cp'"),
    ],
)
def test_a_broken_shared_form_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(f"architecture: resnet50\n{text}")
    with pytest.raises(UserError) as caught:
        CompressionPlan.load(path)
    assert message in str(caught.value)
