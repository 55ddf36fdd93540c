"""The tuner's graphs, costs and choices; no assertion on time itself."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from norton_deploy.compression.compress import apply_structure
from norton_deploy.cost.complexity import LayerCall, LayerShape, count_complexity, layer_calls
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.search import form_tuning as tuning
from norton_deploy.search import layer_timing
from norton_deploy.search.form_tuning import TimingTable, tune_blocks
from norton_deploy.search.layer_timing import bound_call, layer_graph, time_forms

ONE, NONE = (1, 1), (0, 0)
BLOCK = LayerShape("conv", 6, 8, (3, 3), (2, 1), (1, 2), (1, 2), 2, (2, 9, 10))
SHAPES = (
    BLOCK,
    LayerShape("conv", 4, 5, (1, 1), (2, 2), NONE, ONE, 0, (1, 8, 8)),
    LayerShape("transposed", 4, 5, (4, 4), (2, 2), (1, 1), ONE, 0, (3, 7, 7)),
    LayerShape("linear", 12, 7, ONE, ONE, NONE, ONE, 0, (10, 1, 1)),
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind + str(shape.rank))
def test_every_form_has_the_layers_output(shape: LayerShape) -> None:
    import onnxruntime

    for form in layer_timing.FORMS if shape.rank else ("dense",):
        content, example = layer_graph(shape, form)
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        [output] = session.run(None, {"input": example})
        assert output.shape[1] == shape.out_channels
        assert output.size == shape.output_pixels * shape.out_channels
        assert np.isfinite(output).all()


def test_macs_and_parameters_are_those_of_the_complexity_counter() -> None:
    settings = DetectorSettings(
        num_classes=3,
        backbone=BackboneSettings("resnet18", fpn_channels=16),
        roi=RoiSettings(box_features=32, mask_channels=(16,)),
        image=ImageSettings(64, 64),
    )
    plan = CompressionPlan(
        "rcnn",
        {"backbone.body.layer2.0.conv1": 2, "rpn.head.conv.0.0": 1, "roi_heads.mask_head.0.0": 3},
        {"backbone.body.layer2.0.conv1": 80, "backbone.fpn.layer_blocks": 12},
    )
    model = apply_structure(settings.build("mask"), plan)
    calls = layer_calls(model, (64, 96), proposals=20, detections=5)
    counted = count_complexity(model, (64, 96), proposals=20, detections=5)
    assert sum(call.shape.macs for call in calls) == counted.macs
    assert [call.name for call in calls].count("rpn.head.conv.0.0") == 5


@pytest.mark.parametrize("engine", ["onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8"])
def test_measured_times_are_positive_and_one_per_form(engine: layer_timing.TimedEngine) -> None:
    times = time_forms(BLOCK, layer_timing.FORMS, engine)
    assert len(times) == 3
    assert min(times) > 0


@pytest.mark.parametrize("shape", [BLOCK, *SHAPES[1::2]], ids=lambda shape: shape.kind + str(shape.rank))
def test_a_layer_in_8_bits_has_them_in_every_convolution(shape: LayerShape) -> None:
    import onnx
    import onnxruntime

    content, example = layer_graph(shape, "separable" if shape.rank else "dense")
    rounded = layer_timing.in_8_bits(content)
    nodes = onnx.load_from_string(rounded).graph.node
    weights = [node.input[0] for node in nodes if node.op_type == "DequantizeLinear" and "weight" in node.input[0]]
    assert len(weights) == (3 if shape.rank else 1)
    [exact], [found] = (
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, {"input": example})
        for graph in (content, rounded)
    )
    assert 0 < np.abs(found - exact).mean() < 0.05 * np.abs(exact).mean() + 8 / 255


def test_what_stays_in_float_is_timed_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded: list[bytes] = []
    monkeypatch.setattr(layer_timing, "in_8_bits", lambda content: rounded.append(content) or content)
    table, last = TimingTable(None, {}, "openvino-int8"), replace(SHAPES[3], in_float=True)
    table.fastest(last)
    assert not rounded
    table.fastest(SHAPES[3])
    assert len(rounded) == 1 and {key.endswith("in float") for key in table.times_ms} == {True, False}


def test_the_table_is_kept_and_belongs_to_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def fake(shape: LayerShape, forms: Iterable[str], engine: str) -> list[float]:
        asked.append(engine)
        return [{"grouped": 1.0, "separable": 2.0, "dense": 3.0}[form] for form in forms]

    monkeypatch.setattr(tuning, "time_forms", fake)
    path = tmp_path / "times.json"
    table = TimingTable(path, {"cpu": "A"})
    assert table.fastest(BLOCK) == ("grouped", 1.0)
    assert table.fastest(SHAPES[1]) == ("dense", 3.0)
    table.save()
    assert TimingTable(path, {"cpu": "A"}).fastest(BLOCK) == ("grouped", 1.0)
    assert len(asked) == 2
    with pytest.raises(UserError, match=r"times\.json.*another machine"):
        TimingTable(path, {"cpu": "B"})


def test_the_fastest_form_over_all_calls_wins_and_slow_factors_stay_dense() -> None:
    table = TimingTable(None, {})
    small = BLOCK.resized(6, 6, 1)
    for shape, times in ((BLOCK, (9.0, 8.0, 5.0)), (small, (1.0, 2.5, 2.0))):
        for form, time_ms in zip(layer_timing.FORMS, times, strict=True):
            table.times_ms[shape.key(form)] = time_ms
    original = LayerShape("conv", 8, 8, (3, 3), ONE, ONE, ONE, 0, (1, 9, 9))
    table.times_ms[original.key("dense")] = 4.0
    slow, fast = tune_blocks(
        [LayerCall("slow", BLOCK), LayerCall("fast", small), LayerCall("slow", small)],
        table,
        [LayerCall("slow", original), LayerCall("fast", original)],
    )
    assert slow.times_ms == {"grouped": 10.0, "separable": 10.5, "dense": 7.0}
    assert (slow.form, fast.form) == ("dense", "grouped")
    assert "stays dense" in slow.verdict
    assert fast.original_ms == 4.0


def test_on_a_gpu_events_on_its_stream_are_the_clock(monkeypatch):
    """Fakes for a GPU and a provider: ONNX Runtime gets the stream that the events are recorded on."""
    import torch

    from norton_deploy.cost import session as sessions

    made: list[tuple[str, float]] = []

    class Event:
        ticks = 0.0

        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            Event.ticks += 30.0  # ms from event to event, in which CUDA_RUNS runs lie
            self.at = Event.ticks
            made.append(("record", stream.cuda_stream))

        def synchronize(self):
            made.append(("wait", 0))

        def elapsed_time(self, other):
            return other.at - self.at

    class Stream:
        cuda_stream = 77

    handles: list[int | None] = []
    real, calls = sessions.make_session, []

    def make_session(content, *, providers, cuda_stream):
        assert providers == ["CUDAExecutionProvider"]
        handles.append(cuda_stream)
        return real(content, "cpu")

    def bound(session, example, device, runs):
        assert device == "cuda"
        calls.append(runs)
        return bound_call(session, example, "cpu", runs)

    monkeypatch.setattr(layer_timing, "bound_call", bound)
    monkeypatch.setattr(sessions, "make_session", make_session)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    times = time_forms(BLOCK, ("grouped", "dense"), "onnxruntime-cuda")
    assert times == [pytest.approx(3.0)] * 2  # 30 ms for ten runs
    assert handles == [77, 77] and calls == [layer_timing.CUDA_RUNS] * 2
    assert {stream for kind, stream in made if kind == "record"} == {77}
