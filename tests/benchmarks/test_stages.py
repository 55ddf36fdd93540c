"""Which stage a node belongs to, and how a profile is added up."""

from types import SimpleNamespace

import pytest
from onnx import helper

from benchmarks.lib.stages import macs_ceiling, stage_macs, stage_of_layer, stages_of_events, stages_of_nodes
from norton_deploy.errors import UserError


def chain():
    """images -> body -> fpn -> proposals -> class_logits -> boxes -> masks, with side branches."""
    node = helper.make_node
    inner = helper.make_graph([node("Mul", ["w", "w"], ["ww"])], "g", [], [])
    return [
        node("Conv", ["images", "w0"], ["stage/body.0"], name="conv1"),
        node("Conv", ["w"], ["unused_by_boxes"], name="helper"),
        node("Conv", ["stage/body.0"], ["stage/fpn.0"], name="inner"),
        node("If", ["stage/fpn.0"], ["stage/proposals"], name="select", then_branch=inner, else_branch=inner),
        node("Add", ["stage/proposals", "stage/fpn.0"], ["rois"], name="roi"),
        node("Gemm", ["rois"], ["stage/class_logits"], name="fc"),
        node("TopK", ["stage/class_logits"], ["boxes", "scores"], name="top"),
        node("Conv", ["boxes", "stage/fpn.0"], ["mask_logits"], name="mask_conv"),
        node("Sigmoid", ["mask_logits"], ["masks"], name="mask_sigmoid"),
        node("Not", ["scores"], ["nms_converged"], name="flag"),
    ]


def test_nodes_belong_to_the_first_boundary_that_needs_them():
    stages = stages_of_nodes(chain(), "g.onnx")
    expected = {
        "conv1": "backbone", "inner": "fpn_rpn", "select": "fpn_rpn", "roi": "heads", "fc": "heads",
        "top": "postprocess", "mask_conv": "heads", "mask_sigmoid": "heads", "flag": "postprocess",
    }  # fmt: skip
    assert {name: stages[name] for name in expected} == expected
    assert stages["rois"] == "heads"  # tensors too: fused nodes are named after them


def test_graphs_without_boundaries_are_refused():
    with pytest.raises(UserError, match=r"stage/proposals.*export it"):
        stages_of_nodes([n for n in chain() if n.name != "select"], "g.onnx")


def test_events_are_added_up_by_stage_without_warm_up_and_inner_nodes():
    def event(name, ts, dur):
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": dur}

    run = [
        event("conv1", 0, 100),
        event("ReorderOutput_token_1", 100, 20),  # inserted: belongs to what ran before it
        event("stage/fpn.0_nchwc", 120, 50),  # fused and named after its output
        event("select", 200, 300),
        event("body_of_the_loop", 210, 200),  # inside select
        event("fc", 500, 30),
        event("top", 530, 10),
    ]
    events = [{"cat": "Session", "name": "model_run", "ts": start, "dur": 600} for start in (0, 1000, 2000)]
    for start in (0, 1000, 2000):
        events += [one | {"ts": one["ts"] + start} for one in run]
    total_ms = stages_of_events(events, stages_of_nodes(chain(), "g.onnx"), skip_runs=1)
    expected = {"backbone": 0.24, "fpn_rpn": 0.7, "heads": 0.06, "postprocess": 0.02}
    assert total_ms == pytest.approx(expected)


@pytest.mark.slow
def test_eager_and_exported_detector_are_split_alike(tmp_path):
    """A real export: every stage gets time, both engines find the same, and the proposals are counted."""
    import cv2
    import numpy as np
    import torch

    from benchmarks.lib.stages import STAGES, split_stages
    from norton_deploy.compression.lowering import lower_model
    from norton_deploy.data.synthetic import draw_scene
    from norton_deploy.export.onnx_export import export_onnx
    from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
    from norton_deploy.inference.loading import load_predictor
    from norton_deploy.inference.torch_backend import TorchPredictor
    from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
    from norton_deploy.models.detectors import DetectorSettings
    from norton_deploy.structures import Categories

    torch.manual_seed(0)
    settings = DetectorSettings(
        num_classes=3,
        backbone=BackboneSettings("resnet18", norm="batch", fpn_channels=16),
        roi=RoiSettings(box_features=32, score_threshold=0.0, detections_per_image=10),
        image=ImageSettings(64, 64),
        rpn=RpnSettings(anchor_sizes=(8, 16, 24, 32, 48), pre_nms=(50, 50), post_nms=(40, 40)),
    )
    model = settings.build("box").eval()
    categories = Categories((1, 2), (1, 2), ("a", "b"))
    graph = StaticRCNN(lower_model(model), GraphSettings((64, 64)))
    export_onnx(graph, tmp_path / "model.onnx", categories=categories)
    image = tmp_path / "scene.png"
    cv2.imwrite(str(image), draw_scene(3, (64, 64)).image)
    eager = TorchPredictor(model, "box", categories, device="cpu")
    exported = load_predictor(tmp_path / "model.onnx", device="cpu")
    [(_, expected)], [(_, found)] = eager.predict_files([image]), exported.predict_files([image])
    assert len(expected) == 10
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=0.02)
    np.testing.assert_array_equal(found.labels, expected.labels)
    for predictor in (eager, exported, load_predictor(tmp_path / "model.onnx", backend="openvino")):
        split = split_stages(predictor, [image], calls=2)
        assert split.proposals == 40
        for stage in set(STAGES) - {"other"}:
            assert split.stages_ms[stage] > 0, (predictor.backend, stage)


def test_an_engines_layers_are_those_of_its_nodes():
    stages = stages_of_nodes(chain(), "g.onnx")
    layers = {
        "conv1 + helper": "backbone",
        "{ForeignNode[inner...select]}": "fpn_rpn",
        "PWN(PWN(mask_sigmoid), mask_conv)": "heads",
        "Reformatting CopyNode for Input Tensor 0 to top": "postprocess",
        "copy of something": "other",
    }
    assert {name: stage_of_layer(name, stages) for name in layers} == layers


def test_amdahls_bound():
    stages_ms = {"decode": 10.0, "backbone": 60.0, "heads": 30.0}
    assert macs_ceiling(stages_ms, {"backbone": 0.5}) == pytest.approx(100 / 70)
    assert macs_ceiling(stages_ms, {"backbone": 0.0, "heads": 0.0}) == pytest.approx(10)
    assert macs_ceiling(stages_ms, {}) == 1
    with pytest.raises(UserError, match="neck"):
        macs_ceiling(stages_ms, {"neck": 0.5})


def test_stage_macs_follow_layer_names():
    names = {"backbone.body.conv1": 5, "backbone.fpn.inner": 7, "rpn.head.conv": 11, "roi_heads.box_head.fc6": 13}
    layers = tuple(SimpleNamespace(name=name, macs=macs) for name, macs in names.items())
    assert stage_macs(SimpleNamespace(layers=layers)) == {"backbone": 5, "fpn_rpn": 18, "heads": 13}
    with pytest.raises(UserError, match="classifier"):
        stage_macs(SimpleNamespace(layers=(SimpleNamespace(name="classifier.fc", macs=1),)))
