"""Which stage of a detector a node of its exported graph belongs to, and what a profile says about each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.errors import UserError

STAGE_PREFIX = "stage/"
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
class GraphStages:
    """What a graph says about its stages.

    Attributes:
        stage_of_name: the stage of every node name and of every tensor name that a node writes. The graph's own
            normalisation of the pixels counts to the backbone.
        proposals: rows of the proposals tensor, per image; None if the file does not record its shape.
    """

    stage_of_name: dict[str, str]
    proposals: int | None


def read_graph_stages(path: Path) -> GraphStages:
    """Read an exported graph.

    Raises:
        UserError: the graph does not name the tensors between its stages.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in graph.value_info}
    proposals = shapes.get("stage/proposals")
    return GraphStages(stages_of_nodes(graph.node, str(path)), proposals[1] if proposals else None)


def stages_of_nodes(nodes: Sequence[Any], source: str) -> dict[str, str]:
    """`GraphStages.stage_of_name` from a graph's nodes; subgraphs belong to the node that holds them.

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
        stage_of_name: from `GraphStages`.
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
