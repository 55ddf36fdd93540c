"""Channels of equal range between the two convolutions of a decomposed layer, before a graph gets 8 bits.

A CP decomposition leaves open how a term's length is divided between its factors: what the pointwise convolution gives
for a filter can be a hundred times as large as for the next one, and 8 bits with one range for all of them lose the
small ones. Nothing lies between the two convolutions, so each channel can be scaled in the first and scaled back in the
second; the graph's function stays. Both have a scale for each output channel in 8 bits, so for one term a filter the
weights lose nothing by it (M. Nagel et al., Data-free quantization through weight equalization and bias correction,
ICCV 2019, do the same across a ReLU, where they have to).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.session import make_session

SMALLEST = 1e-4
"""A channel counts as at least this share of the largest: one that is nearly always zero is not blown up."""


def equalised(model: Any, batches: Sequence[npt.NDArray[Any]]) -> Any:
    """A copy of an fp32 graph in which every channel between a pointwise and a grouped convolution has one range.

    Args:
        model: an onnx.ModelProto of `export_onnx`; not changed.
        batches: inputs of the graph, whose largest absolute values are a channel's range.
    """
    from onnx import numpy_helper

    changed = copy.deepcopy(model)
    pairs = _pairs(changed)
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    for (first, second), largest in _ranges(changed, pairs, batches).items():
        scale = largest.max() / np.maximum(largest, SMALLEST * largest.max())
        for name, factor in ((first, scale[:, None, None, None]), (second, 1 / scale)):
            weight = numpy_helper.to_array(tensors[name])
            if name == second:  # [O, terms, h, w]: input channel o * terms + r belongs to term r of output o
                factor = factor.reshape(*weight.shape[:2], 1, 1)
            tensors[name].CopyFrom(numpy_helper.from_array((weight * factor).astype(np.float32), name))
    return changed


def _pairs(model: Any) -> dict[tuple[str, str], list[str]]:
    """(weight of a pointwise convolution without bias, of the grouped one that alone reads it) -> tensors between."""
    from onnx import numpy_helper

    graph = model.graph
    zeros = {tensor.name for tensor in graph.initializer if not numpy_helper.to_array(tensor).any()}
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: dict[tuple[str, str], list[str]] = {}
    for node in graph.node:
        if (
            node.op_type != "Conv"
            or not zeros.issuperset(node.input[2:])
            or shapes.get(node.input[1], ())[2:] != (1, 1)
        ):
            continue
        following = readers.get(node.output[0], [])
        if len(following) != 1 or following[0].op_type != "Conv" or following[0].input[1] not in shapes:
            continue
        channels, (outputs, terms) = shapes[node.input[1]][0], shapes[following[0].input[1]][:2]
        groups = next((entry.i for entry in following[0].attribute if entry.name == "group"), 1)
        if groups == outputs and outputs * terms == channels:
            found.setdefault((node.input[1], following[0].input[1]), []).append(node.output[0])
    return found


def _ranges(
    model: Any, pairs: dict[tuple[str, str], list[str]], batches: Sequence[npt.NDArray[Any]]
) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    """Pair -> the largest absolute value of each channel between them, over all tensors and batches."""
    from onnx import TensorProto, helper, numpy_helper

    measured = copy.deepcopy(model)
    graph = measured.graph
    del graph.output[:]
    graph.initializer.append(numpy_helper.from_array(np.array([0, 2, 3], np.int64), "range/axes"))
    between = [name for names in pairs.values() for name in names]
    for name in between:
        graph.node.append(helper.make_node("Abs", [name], [f"range/abs/{name}"]))
        graph.node.append(
            helper.make_node("ReduceMax", [f"range/abs/{name}", "range/axes"], [f"range/{name}"], keepdims=0)
        )
        graph.output.append(helper.make_tensor_value_info(f"range/{name}", TensorProto.FLOAT, None))
    if not between:
        return {}
    session = make_session(measured.SerializeToString(), "cpu")
    runs = [session.run(None, {graph.input[0].name: batch}) for batch in batches]
    largest = dict(zip(between, map(np.maximum.reduce, zip(*runs, strict=True)), strict=True))
    return {pair: np.maximum.reduce([largest[name] for name in names]) for pair, names in pairs.items()}
