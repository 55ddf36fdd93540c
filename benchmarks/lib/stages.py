"""Where the time goes inside a detector: backbone, FPN + RPN, heads, post-processing.

Which stage a node of an exported graph belongs to follows from the tensors between the stages, which the graph names.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from norton_deploy.cost.complexity import Complexity
from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError
from norton_deploy.export.letterbox import letterboxed
from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor
from norton_deploy.inference.openvino_backend import OpenVinoPredictor
from norton_deploy.inference.predictor import Predictor
from norton_deploy.inference.static_graph import to_graph_input
from norton_deploy.inference.tensorrt_backend import TensorRTPredictor
from norton_deploy.inference.torch_backend import TorchPredictor

STAGES = ("decode", "preprocess", "copy", "backbone", "fpn_rpn", "heads", "postprocess", "other")
HEADS = ("box_roi_pool", "box_head", "box_predictor", "mask_roi_pool", "mask_head", "mask_predictor",
         "keypoint_roi_pool", "keypoint_head", "keypoint_predictor")  # fmt: skip
OUTER_STAGES = {"decode_ms": "decode", "preprocess_ms": "preprocess", "copy_ms": "copy",
                "postprocess_ms": "postprocess"}  # fmt: skip
STAGE_OF_LAYER = {"backbone.body.": "backbone", "backbone.fpn.": "fpn_rpn", "rpn.": "fpn_rpn", "roi_heads.": "heads"}
EVENT_SUFFIX = "_kernel_time"
LAYOUT_SUFFIX = "_nchwc"
# In the order of the data flow: whatever a boundary needs that no earlier one needed is its stage.
# A boundary that a graph lacks (masks in a box detector) is passed over.
BOUNDARIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("backbone", ("stage/body.",)),
    ("fpn_rpn", ("stage/fpn.", "stage/rpn_logits.", "stage/rpn_deltas.", "stage/proposals", "stage/proposal_valid")),
    ("heads", ("stage/class_logits", "stage/box_deltas")),
    ("postprocess", ("boxes", "scores", "labels", "num_detections")),
    ("heads", ("masks", "stage/heatmaps")),
)  # fmt: skip
LAST_STAGE = "postprocess"
NEEDED = ("stage/body.", "stage/proposals", "stage/class_logits")


@dataclass(frozen=True)
class StageSplit:
    """Mean time of each stage over some calls.

    Attributes:
        stages_ms: for each of `STAGES`; "other" is what the engine spends between its nodes.
        method: how it was measured, in words.
        proposals: mean number of proposals per image that entered the box head (of a graph: its fixed number of
            rows); None where that is not known.
    """

    stages_ms: dict[str, float]
    method: str
    proposals: float | None


def split_stages(predictor: Predictor, images: Sequence[Path], *, calls: int) -> StageSplit:
    """Measure the stages of a predictor in a run of its own, since looking inside costs time.

    Torch: hooks on the modules in eager mode, the device synchronised at each boundary. Engines: their own profiler
    (ONNX Runtime's in a second session), each node counted to the stage that the graph's "stage/..." tensors delimit.

    Args:
        predictor: a torch, ONNX Runtime, OpenVINO or TensorRT predictor; an engine's graph must lie beside it.
        images: image files, used in turn.
        calls: measured calls, after one for warm-up.

    Raises:
        UserError: a backend that cannot be split, or a graph without stage tensors.
    """
    if isinstance(predictor, TorchPredictor):
        records, predictor.records = predictor.records, False
        try:
            return _split_torch(predictor, images, calls)
        finally:
            predictor.records = records
    if isinstance(predictor, TensorRTPredictor):
        return _split_tensorrt(predictor, images, calls)
    if predictor.backend == "onnxruntime" and predictor.input_size is not None:
        return _split_onnxruntime(predictor, images, calls)
    if isinstance(predictor, OpenVinoPredictor) and predictor.name.endswith(".onnx"):
        return _split_openvino(predictor, images, calls)
    raise UserError(f"{predictor.name}: stages of backend '{predictor.backend}' cannot be told apart")


def _split_torch(predictor: TorchPredictor, images: Sequence[Path], calls: int) -> StageSplit:
    model: Any = predictor.model
    total_ms = dict.fromkeys(STAGES, 0.0)
    proposals: list[int] = []
    started = 0.0

    def synchronised() -> float:
        if predictor.torch_device.type == "cuda":
            torch.cuda.synchronize(predictor.torch_device)
        return time.perf_counter()

    def before(*_: Any) -> None:
        nonlocal started
        started = synchronised()

    def after(stage: str, *_: Any) -> None:
        total_ms[stage] += (synchronised() - started) * 1e3

    predictor.predict_files([images[0]])
    watched = [(model.transform, "preprocess"), (model.backbone.body, "backbone"), (model.backbone.fpn, "fpn_rpn")]
    watched += [(model.rpn, "fpn_rpn"), *((getattr(model.roi_heads, name, None), "heads") for name in HEADS)]
    handles = [model.rpn.register_forward_hook(lambda _m, _i, output: proposals.append(len(output[0][0])))]
    for module, stage in watched:
        if module is not None:
            hooks = module.register_forward_pre_hook(before), module.register_forward_hook(partial(after, stage))
            handles += hooks
    try:
        for call in range(calls):
            before_ms = sum(total_ms.values())
            predictor.predict_files([images[call % len(images)]])
            timing = vars(predictor.timing)
            inside_ms = sum(total_ms.values()) - before_ms
            for field, stage in OUTER_STAGES.items():
                total_ms[stage] += timing[field]
            # What the model does outside these modules: box selection, heatmap decoding, mask pasting.
            total_ms["postprocess"] += timing["infer_ms"] - inside_ms
    finally:
        for handle in handles:
            handle.remove()
    stages_ms = {stage: total / calls for stage, total in total_ms.items()}
    return StageSplit(stages_ms, "torch module hooks, synchronised", float(np.mean(proposals)))


def _split_onnxruntime(predictor: Predictor, images: Sequence[Path], calls: int) -> StageSplit:
    assert isinstance(predictor, OnnxRuntimePredictor)
    graph = onnx.load(predictor.name, load_external_data=False).graph
    stage_of_name = stages_of_nodes(graph.node, predictor.name)
    shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in graph.value_info}
    proposals = shapes["stage/proposals"][1] if "stage/proposals" in shapes else None  # rows of the tensor
    with tempfile.TemporaryDirectory() as folder:
        profiled = OnnxRuntimePredictor(
            Path(predictor.name), providers=predictor.providers, profile_prefix=Path(folder) / "profile"
        )
        total_ms = dict.fromkeys(STAGES, 0.0)
        profiled.predict_files([images[0]])
        for call in range(calls):
            profiled.predict_files([images[call % len(images)]])
            timing = vars(profiled.timing)
            for field, stage in OUTER_STAGES.items():
                total_ms[stage] += timing[field]
            total_ms["other"] += timing["infer_ms"]
        events = json.loads(profiled.end_profiling().read_text())
    for stage, time_ms in stages_of_events(events, stage_of_name, skip_runs=1).items():
        total_ms[stage] += time_ms
        total_ms["other"] -= time_ms
    stages_ms = {stage: total / calls for stage, total in total_ms.items()}
    return StageSplit(stages_ms, "ONNX Runtime's profiler, node times by stage", proposals)


def _split_openvino(predictor: OpenVinoPredictor, images: Sequence[Path], calls: int) -> StageSplit:
    graph = onnx.load(predictor.name, load_external_data=False).graph
    stage_of_name = stages_of_nodes(graph.node, predictor.name)
    shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in graph.value_info}
    profiled = OpenVinoPredictor(Path(predictor.name), float_type=predictor.float_type, profile=True)
    originals = profiled.fused_names()
    total_ms = dict.fromkeys(STAGES, 0.0)
    profiled.predict_files([images[0]])
    for call in range(calls):
        profiled.predict_files([images[call % len(images)]])
        timing = vars(profiled.timing)
        for field, stage in OUTER_STAGES.items():
            total_ms[stage] += timing[field]
        total_ms["other"] += timing["infer_ms"]
        for name, time_ms in profiled.profile_ms().items():
            # a node that OpenVINO put in has no counterpart in the graph: it stays in "other"
            known = [stage_of_name[part] for part in (name, *originals.get(name, ())) if part in stage_of_name]
            if known:
                total_ms[known[0]] += time_ms
                total_ms["other"] -= time_ms
    stages_ms = {stage: total / calls for stage, total in total_ms.items()}
    return StageSplit(stages_ms, "OpenVINO's profiling info, node times by stage", shapes["stage/proposals"][1])


def _split_tensorrt(predictor: TensorRTPredictor, images: Sequence[Path], calls: int) -> StageSplit:
    file, contract = Path(predictor.name).with_suffix(".onnx"), predictor.contract
    graph = onnx.load(file, load_external_data=False).graph
    stage_of_name = stages_of_nodes(graph.node, str(file))
    total_ms = dict.fromkeys(STAGES, 0.0)
    for call in range(-1, calls):
        frame = letterboxed([read_image(images[call % len(images)])] * contract.batch, contract.input_size)
        layers = predictor.layer_times_ms(to_graph_input(frame, contract.input_dtype))
        for name, time_ms in layers.items() if call >= 0 else ():
            total_ms[stage_of_layer(name, stage_of_name)] += time_ms
        predictor.predict_files([images[call % len(images)]])
        for field, stage in OUTER_STAGES.items() if call >= 0 else ():
            total_ms[stage] += vars(predictor.timing)[field]
    stages_ms = {stage: total / calls for stage, total in total_ms.items()}
    return StageSplit(stages_ms, "TensorRT's profiler, layer times by stage", None)


def stage_of_layer(name: str, stage_of_name: dict[str, str]) -> str:
    """The stage of the first node that a layer of an engine names: layers are fused, "node_a + node_b", or a span of
    nodes, "{ForeignNode[node_a...node_b]}"; "other" for what the engine put in itself."""
    parts = re.split(r"\.\.\.|[^\w./]+", name)
    return next((stage_of_name[part] for part in parts if part in stage_of_name), "other")


def stage_macs(complexity: Complexity) -> dict[str, int]:
    """MACs of the stages that have any (backbone, fpn_rpn, heads), from layer names.

    Raises:
        UserError: not a detector's layers.
    """
    totals = dict.fromkeys(STAGE_OF_LAYER.values(), 0)
    for layer in complexity.layers:
        stage = next((stage for prefix, stage in STAGE_OF_LAYER.items() if layer.name.startswith(prefix)), None)
        if stage is None:
            raise UserError(f"layer '{layer.name}': not part of a two-stage detector")
        totals[stage] += layer.macs
    return totals


def stages_of_nodes(nodes: Sequence[Any], source: str) -> dict[str, str]:
    """The stage of every node name of a graph and of every tensor name that a node writes.

    Subgraphs belong to the node that holds them, the graph's own normalisation of the pixels to the backbone.

    Raises:
        UserError: a tensor between the stages is not there; names `source`.
    """
    producer = {output: node for node in nodes for output in node.output if output}
    for prefix in NEEDED:
        if not any(name.startswith(prefix) for name in producer):
            raise UserError(f"{source}: no tensor '{prefix}...' in the graph; export it with this version")
    stage_of: dict[str, str] = {}
    for stage, prefixes in BOUNDARIES:
        waiting = [name for name in producer if name.startswith(prefixes)]
        while waiting:
            node = producer.get(waiting.pop())
            if node is None or node.name in stage_of:
                continue
            stage_of[node.name] = stage
            waiting += _reads(node)
    for node in nodes:
        stage_of.setdefault(node.name, LAST_STAGE)
    tensors = {output: stage_of[node.name] for output, node in producer.items()}
    return tensors | stage_of


def _reads(node: Any) -> Iterable[str]:
    """Inputs of a node and what its subgraphs take from outside."""
    yield from node.input
    for attribute in node.attribute:
        for inner in attribute.g.node:
            yield from _reads(inner)


def stages_of_events(
    events: Sequence[dict[str, Any]], stage_of_name: dict[str, str], *, skip_runs: int
) -> dict[str, float]:
    """Sum the node times of an ONNX Runtime profile by stage, in milliseconds.

    ONNX Runtime names a fused node after one of the nodes or tensors it replaces; layout conversions that
    it inserts have names of their own and count to the stage of the node before them. A node inside another
    (a loop's body) is part of the outer one.

    Args:
        events: the profile.
        stage_of_name: of `stages_of_nodes`.
        skip_runs: warm-up runs at the beginning that do not count.
    """
    runs = sorted(event["ts"] for event in events if event.get("name") == "model_run")
    first = runs[skip_runs] if len(runs) > skip_runs else 0
    nodes = [
        event
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith(EVENT_SUFFIX) and event["ts"] >= first
    ]
    total_ms: dict[str, float] = {}
    stage, outer_end = "backbone", 0
    for event in sorted(nodes, key=lambda event: (event["ts"], -event["dur"])):
        if event["ts"] + event["dur"] <= outer_end:
            continue
        outer_end = event["ts"] + event["dur"]
        name = event["name"].removesuffix(EVENT_SUFFIX)
        stage = stage_of_name.get(name) or stage_of_name.get(name.removesuffix(LAYOUT_SUFFIX)) or stage
        total_ms[stage] = total_ms.get(stage, 0.0) + event["dur"] / 1e3
    return total_ms


def macs_ceiling(baseline_stages_ms: dict[str, float], macs_ratio: dict[str, float]) -> float:
    """Amdahl's bound: the speed-up if every stage's time shrank exactly as its MACs do.

    Stages without MACs (decoding, copies, box selection) keep their time; what is beyond this figure comes
    from elsewhere than the saved arithmetic (a better kernel form, another engine).

    Args:
        baseline_stages_ms: stage -> time of the baseline.
        macs_ratio: stage -> candidate MACs / baseline MACs, for the stages that have MACs.

    Raises:
        UserError: a ratio for a stage that was not measured.
    """
    unknown = macs_ratio.keys() - baseline_stages_ms.keys()
    if unknown:
        raise UserError(f"Amdahl's bound: no measured time for the stages {', '.join(sorted(unknown))}")
    shrunk_ms = sum(time_ms * macs_ratio.get(stage, 1.0) for stage, time_ms in baseline_stages_ms.items())
    return sum(baseline_stages_ms.values()) / shrunk_ms
