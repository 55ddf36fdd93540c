from benchmarks.lib.narrow_plan import narrow_plan
from benchmarks.lib.rank_one import rank_one_plan
from norton_deploy.compression.channel_groups import channel_groups, output_width
from norton_deploy.compression.compress import apply_structure, compress
from norton_deploy.compression.fit_plan import fit_plan
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings

WIDE = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=32),
    roi=RoiSettings(box_features=64, mask_channels=(32,) * 4),
)
NARROW = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    roi=RoiSettings(box_features=48, mask_channels=(8, 8)),
)
PLAN = CompressionPlan(
    "rcnn",
    {"backbone.body.layer1.0.conv1": 2, "roi_heads.mask_head.0.0": 1, "roi_heads.mask_head.3.0": 1},
    {
        "backbone.body.layer3": 200, "backbone.fpn.layer_blocks": 14, "roi_heads.box_head.fc6": 32,
        "roi_heads.mask_head.1.0": 20, "roi_heads.mask_head.2.0": 20,
    },
)  # fmt: skip


def test_shares_stay_and_absent_layers_go() -> None:
    narrow, wide = (settings.build("mask") for settings in (NARROW, WIDE))
    plan = narrow_plan(PLAN, narrow, wide)
    assert plan.ranks == {"backbone.body.layer1.0.conv1": 2, "roi_heads.mask_head.0.0": 1}
    assert plan.keep == {
        "backbone.body.layer3": 200,
        "backbone.fpn.layer_blocks": 7,
        "roi_heads.box_head.fc6": 24,
        "roi_heads.mask_head.1.0": 5,
    }
    small = compress(narrow, plan, starts=1)
    producer = channel_groups(narrow)["backbone.fpn.layer_blocks"].producers[0]
    assert output_width(small.get_submodule(producer)) == 7


def test_equal_widths_leave_the_plan_as_it_is() -> None:
    wide = WIDE.build("mask")
    assert narrow_plan(PLAN, wide, wide) == fit_plan(wide, PLAN)


def test_all_3x3_convolutions_of_a_detector_get_a_form_at_the_macs_of_rank_1() -> None:
    narrow, size = NARROW.build("box"), (64, 96)
    paper, shared = (rank_one_plan(narrow, "rcnn", size, form) for form in ("filter", "layer_cp"))
    assert len(paper.ranks) == 16 + 4 + 1  # a ResNet-18's, the pyramid's, the RPN's: not the 7x7 stem
    assert {"rpn.head.conv.0.0", "backbone.fpn.layer_blocks.3.0"} <= set(paper.ranks) == set(shared.layer_cp)
    small = (apply_structure(NARROW.build("box"), plan) for plan in (paper, shared))
    macs, shared_macs = (count_complexity(model, size).macs for model in small)
    assert 0.9 * macs < shared_macs <= macs < 0.5 * count_complexity(narrow, size).macs
