"""Which layers suffer most from 8 bits: each quantised alone, its error taken where RPN and heads put out.

What is chosen on the way (proposals, detections) is given from the float graph: another choice would hide what the
layers do.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.session import make_session
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import STAGE_PREFIX
from norton_deploy.export.quantise import LAST_STAGES, Ranges, quantisable_layers, quantised

GIVEN = (STAGE_PREFIX + "proposals", STAGE_PREFIX + "canvas_boxes", "boxes", "labels")
Arrays = dict[str, npt.NDArray[Any]]


class HeadErrors:
    """Errors of quantised forms of one graph at the outputs of RPN and heads."""

    def __init__(self, model: Any, ranges: Ranges, batches: Sequence[npt.NDArray[Any]], *, symmetric: bool) -> None:
        """
        Args:
            model: an onnx.ModelProto of `export_onnx`, in fp32.
            ranges: of `calibrate`.
            batches: inputs of the graph to measure on.
            symmetric: see `quantised`.
        """
        self.model, self.ranges, self.batches, self.symmetric = model, ranges, batches, symmetric
        self.layers = list(quantisable_layers(model))
        self.input_name = model.graph.input[0].name
        written = {name: node for node in model.graph.node for name in node.output}
        # labels leave as a cast copy, and what is read is its original
        casts = {name: node.input[0] for name, node in written.items() if node.op_type == "Cast"}
        self.given = [casts.get(name, name) for name in GIVEN if name in written]
        self.heads = sorted(name for name in written if name.startswith(LAST_STAGES) or name == "masks")
        names = [*self.heads, *self.given]
        session = make_session(_with_outputs(model, names).SerializeToString(), "cpu")
        self.expected: list[Arrays] = [
            dict(zip(names, session.run(names, {self.input_name: batch}), strict=True)) for batch in batches
        ]

    def of(self, layers: Collection[str]) -> float:
        """The largest of `by_head`."""
        return max(self.by_head(layers).values())

    def by_head(self, layers: Collection[str]) -> dict[str, float]:
        """Head's output -> its error, root of mean square over that of the output, with only `layers` in 8 bits."""
        rest = [name for name in quantisable_layers(self.model) if name not in layers]
        graph = quantised(self.model, self.ranges, float_layers=rest, symmetric=self.symmetric)
        graph = _with_outputs(_with_given(graph, self.given), self.heads)
        session = make_session(graph.SerializeToString(), "cpu")
        taken = [name for name in self.given if any(_given(name) == value.name for value in session.get_inputs())]
        squares = np.zeros((2, len(self.heads)))
        for batch, expected in zip(self.batches, self.expected, strict=True):
            feeds = {_given(name): expected[name] for name in taken} | {self.input_name: batch}
            for index, (name, found) in enumerate(zip(self.heads, session.run(self.heads, feeds), strict=True)):
                squares[0, index] += np.square(found - expected[name], dtype=np.float64).sum()
                squares[1, index] += np.square(expected[name], dtype=np.float64).sum()
        return dict(zip(self.heads, np.sqrt(squares[0] / np.maximum(squares[1], 1e-12)).tolist(), strict=True))

    def each(self) -> dict[str, float]:
        """Layer -> its error alone, the worst first."""
        errors = {name: self.of([name]) for name in self.layers}
        return dict(sorted(errors.items(), key=lambda entry: -entry[1]))

    def left_out(self, limit: float) -> list[str]:
        """The worst layers, no more than about twice as many as needed for all others together to stay within `limit`.

        Raises:
            UserError: the limit is not met even with half of the layers in float.
        """
        if self.of(self.layers) <= limit:
            return []
        worst, count = list(self.each()), 1
        while count <= len(worst) // 2:
            if self.of(worst[count:]) <= limit:
                return worst[:count]
            count *= 2
        raise UserError(f"int8: with half of the layers in float the heads' error is still above {limit:g}; raise it")


def _with_outputs(model: Any, names: Sequence[str]) -> Any:
    """The graph with other outputs."""
    from onnx import TensorProto, helper

    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    values = [known.get(name) or helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names]
    changed = type(model)()
    changed.CopyFrom(model)
    del changed.graph.output[:]
    changed.graph.output.extend(values)
    return changed


def _with_given(model: Any, names: Sequence[str]) -> Any:
    """The graph, in place, with inputs where it would have read these tensors of its own."""
    known = {value.name: value for value in (*model.graph.value_info, *model.graph.output)}
    for name in names:
        readers = [node for node in model.graph.node if name in node.input]
        if not readers or name not in known:
            continue
        for node in readers:
            node.input[:] = [_given(name) if read == name else read for read in node.input]
        value = model.graph.input.add()
        value.CopyFrom(known[name])
        value.name = _given(name)
    return model


def _given(name: str) -> str:
    return f"given/{name}"
