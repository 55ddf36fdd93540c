"""The nodes of a graph that take OpenVINO longest, and what they compute in."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from benchmarks.lib.cells import Cell, tabulate
from norton_deploy.cost.openvino_session import openvino_core, openvino_settings
from norton_deploy.export.quantise import LAYERS

SHOWN = 20


def costliest_nodes(file: Path, images: Sequence[npt.NDArray[np.uint8]], calls: int) -> Cell:
    """Medians by OpenVINO's profiler, of all nodes together, by what computes them, and of the longest nodes.

    Args:
        file: a graph, which computes in fp32 what it has in floats.
        images: inputs [H, W, 3], taken in turn.
        calls: measured; one comes before them.
    """
    layers = names_of_layers(file)
    compiled = openvino_core().compile_model(
        openvino_core().read_model(str(file)), "CPU", openvino_settings("f32", profile=True)
    )
    does = {
        node.get_friendly_name(): (node.get_rt_info()["originalLayersNames"].astype(str), shape_of(node))
        for node in compiled.get_runtime_model().get_ops()
        if "originalLayersNames" in node.get_rt_info() and node.outputs()
    }
    request = compiled.create_infer_request()
    times_ms: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for step in range(calls + 1):
        request.infer([images[step % len(images)][None]])
        for entry in request.get_profiling_info() if step else ():
            key = (entry.node_name, entry.node_type, entry.exec_type)
            times_ms[key].append(entry.real_time.total_seconds() * 1e3)
    medians = {key: median(times) for key, times in times_ms.items()}
    by_kind: dict[str, float] = defaultdict(float)
    for (_, kind, computed_by), time_ms in medians.items():
        by_kind[f"{kind}, {computed_by}"] += time_ms
    nodes = []
    for (name, kind, computed_by), time_ms in sorted(medians.items(), key=lambda item: -item[1])[:SHOWN]:
        original, shape = does.get(name, (name, ""))
        layer = next((layers[part] for part in original.split(",") if part in layers), name)
        nodes.append({"node": layer, "kind": kind, "computed_by": computed_by, "output": shape, "ms": time_ms})
    kinds = dict(sorted(by_kind.items(), key=lambda item: -item[1])[:SHOWN])
    return {"total_ms": sum(medians.values()), "by_kind_ms": kinds, "nodes": nodes}


def names_of_layers(file: Path) -> dict[str, str]:
    """Node of a graph -> its layer, by the name of its weight."""
    nodes = [node for node in onnx.load(file).graph.node if node.op_type in LAYERS]
    return {node.name: node.input[1].removeprefix("detector.").partition(".weight")[0] for node in nodes}


def shape_of(node: Any) -> str:
    """Of the first output: 1x64x400x400."""
    shape = node.output(0).get_partial_shape()
    return "x".join(map(str, shape))


def nodes_tables(name: str, cell: Cell) -> list[Any]:
    """The longest nodes, and all by kind."""
    share = f"of {cell['total_ms']:.0f} ms"
    return [
        tabulate(
            f"{name}: the {len(cell['nodes'])} nodes that take OpenVINO longest in int8, by its profiler",
            cell["nodes"],
            {
                "node": lambda row: row["node"],
                "kind": lambda row: row["kind"],
                "computed by": lambda row: row["computed_by"],
                "output": lambda row: row["output"],
                "ms": lambda row: f"{row['ms']:.2f}",
            },
        ),
        tabulate(
            f"{name}: all nodes by what computes them, {share}",
            cell["by_kind_ms"].items(),
            {"kind": lambda row: row[0], "ms": lambda row: f"{row[1]:.2f}"},
        ),
    ]
