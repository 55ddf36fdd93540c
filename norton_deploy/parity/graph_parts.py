"""Parts of an exported graph, cut at its stage tensors, so that the shipped file's own nodes run on given tensors."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from norton_deploy.cost.session import make_session
from norton_deploy.errors import UserError
from norton_deploy.export.onnx_export import STAGE_PREFIX
from norton_deploy.parity.comparison import Arrays


class GraphPart:
    """The nodes between some tensors of a graph, in ONNX Runtime on the CPU.

    Attributes:
        inputs: name without "stage/" -> fixed shape.
    """

    def __init__(self, content: bytes) -> None:
        self._session = make_session(content, "cpu")
        self._names = [value.name for value in self._session.get_outputs()]
        self.inputs = {plain(value.name): tuple(value.shape) for value in self._session.get_inputs()}

    def __call__(self, tensors: Arrays) -> Arrays:
        """Run on tensors by name without "stage/"; more than are needed may be given."""
        feed = {value.name: tensors[plain(value.name)] for value in self._session.get_inputs()}
        found: list[npt.NDArray[np.generic]] = self._session.run(self._names, feed)
        return {plain(name): value for name, value in zip(self._names, found, strict=True)}


def plain(name: str) -> str:
    """A tensor's name without "stage/"."""
    return name.removeprefix(STAGE_PREFIX)


class CuttableGraph:
    """An exported file, read once.

    Attributes:
        stages: names of its stage tensors, without "stage/".
        max_detections: rows of them.
    """

    def __init__(self, path: str | Path) -> None:
        """
        Raises:
            UserError: the file has no stage tensors.
        """
        import onnx

        self._model = onnx.load_model(path)
        graph = self._model.graph
        self._values = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
        self.stages = [plain(name) for name in self._values if name.startswith(STAGE_PREFIX)]
        self.outputs = [value.name for value in graph.output]
        self.max_detections = self._values["boxes"].type.tensor_type.shape.dim[1].dim_value
        if not self.stages:
            raise UserError(f"{path}: its stage tensors are gone; check the file as export_onnx wrote it")

    def part(self, outputs: Sequence[str], given: Sequence[str] = ()) -> GraphPart:
        """The part that makes `outputs` from the graph's input and the `given` stage tensors."""
        import onnx

        graph = self._model.graph
        makers = {name: index for index, node in enumerate(graph.node) for name in node.output}
        ends = {self._full(name) for name in given}
        # A stage tensor that the exporter made as a copy is read under its original's name.
        copies = {end: graph.node[makers[end]] for end in ends if graph.node[makers[end]].op_type == "Identity"}
        backwards = [onnx.helper.make_node("Identity", node.output, node.input) for node in copies.values()]
        ends |= {node.input[0] for node in copies.values()}
        chosen: set[int] = set()
        needed: set[str] = set()
        waiting = [self._full(name) for name in outputs]
        while waiting:
            name = waiting.pop()
            if name in needed:
                continue
            needed.add(name)
            if name in ends or name not in makers or makers[name] in chosen:
                continue
            chosen.add(makers[name])
            waiting += graph.node[makers[name]].input
        used = [node for node in backwards if node.output[0] in needed]
        needed |= {node.input[0] for node in used}
        sources = [*(self._full(name) for name in given), *(value.name for value in graph.input)]
        cut = onnx.helper.make_graph(
            [*used, *(graph.node[index] for index in sorted(chosen))],
            graph.name,
            [self._values[name] for name in sources if name in needed],
            [self._values[self._full(name)] for name in outputs],
            [tensor for tensor in graph.initializer if tensor.name in needed],
        )
        content: bytes = onnx.helper.make_model(
            cut, opset_imports=self._model.opset_import, ir_version=self._model.ir_version
        ).SerializeToString()
        return GraphPart(content)

    def _full(self, name: str) -> str:
        return STAGE_PREFIX + name if name in self.stages else name
