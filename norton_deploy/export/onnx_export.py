"""A static detector as one self-describing ONNX file.

torch's dynamo exporter is used: it keeps static shapes and module names, and takes our own NMS operator through
a translation table. The tensors between the stages keep their names inside the file ("stage/..."), so that the
parity check can read them from the very graph that is shipped.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norton_deploy.errors import UserError
from norton_deploy.export.contract import INPUT_NAME, GraphContract, OutputTensor, Precision
from norton_deploy.export.graph_digest import DIGEST_KEY, UNSIGNED, check_digest, signed
from norton_deploy.export.static_rcnn import StaticRCNN
from norton_deploy.files import atomic_write
from norton_deploy.structures import METADATA_KEY, Categories

OPSET = 20
STAGE_PREFIX = "stage/"
OUTPUT_MEANING = {
    "num_detections": "how many rows of the others are detections",
    "boxes": "xyxy in pixels of the input",
    "scores": "0 to 1, falling",
    "labels": "category, see labels",
    "masks": "0 to 1 over the box; the object is above 0.5",
    "keypoints": "x, y in pixels of the input, and a score",
    "nms_converged": "false: the unrolled suppression was too short for this image",
    "candidates_complete": "false: more candidates than the graph has rows for",
}


class _WithStages(nn.Module):
    """A static detector that returns its outputs and then its stage tensors, as one tuple.

    `names` is filled in place: the exporter undoes assignments to attributes.
    """

    def __init__(self, detector: StaticRCNN, names: list[str]) -> None:
        super().__init__()
        self.detector = detector
        self.names = names

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs, stages = self.detector.outputs_and_stages(images)
        self.names[:] = [*outputs, *(STAGE_PREFIX + name for name in stages)]
        return (*outputs.values(), *stages.values())


def export_onnx(
    detector: StaticRCNN,
    path: str | Path,
    *,
    categories: Categories,
    precision: Precision = "fp32",
    weights_sha256: str = "",
    letterbox: bool = True,
) -> GraphContract:
    """Write `detector` to `path`, whole or not at all.

    Args:
        detector: in the precision that the file shall have (`norton_deploy.export.precision`).
        categories: written into the file, for whoever runs it.
        weights_sha256: digest of the weights that the detector was made from.
        letterbox: whether images of another size may be letterboxed by the caller; says nothing about a graph that
            does it itself.

    Returns:
        The contract that stands in the file's metadata under "norton_deploy".

    Raises:
        UserError: the graph is larger than ONNX's 2 GiB for one file, or the file cannot be written.
    """
    import onnx_ir
    from google.protobuf.message import EncodeError

    model = translate(detector).model
    simplify(model)
    outputs = [value for value in model.graph.outputs if not str(value.name).startswith(STAGE_PREFIX)]
    settings = detector.settings
    contract = GraphContract(
        task=detector.task,
        image_size=settings.image_size,
        input_size=settings.input_size or settings.image_size,
        batch=settings.batch,
        max_detections=detector.max_detections,
        categories=categories,
        input_dtype=settings.input_dtype,
        outputs=tuple(map(_output_tensor, outputs)),
        target=settings.target,
        precision=precision,
        resize="graph" if settings.input_size is not None else "letterbox" if letterbox else "none",
        weights_sha256=weights_sha256,
        score_threshold=detector.box_head.score_thresh,
        mask_paste=detector.mask_paste,
    )
    describe(model, contract)
    try:
        proto = onnx_ir.to_proto(model)
        for node in proto.graph.node:
            del node.metadata_props[:]  # where in torch's program it was: half a megabyte that nothing reads
        proto.graph.value_info.extend(proto.graph.output[len(outputs) :])
        del proto.graph.output[len(outputs) :]
        content = proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise UserError(f"{path}: the graph is larger than the 2 GiB that one ONNX file can hold") from error
    with atomic_write(path) as stream:
        stream.write(signed(content))
    return contract


def describe(model: Any, contract: GraphContract) -> None:
    """Write into an onnx_ir model who made it, what it is, what its tensors mean and its contract, in place."""
    model.producer_name, model.producer_version = "norton_deploy", version("norton-deploy")
    model.graph.name = f"{contract.task}_detector"
    for value in model.graph.outputs:
        value.doc_string = OUTPUT_MEANING.get(str(value.name))
    entries = metadata_of(contract)
    model.doc_string = entries["description"]
    model.metadata_props.update(entries)


def metadata_of(contract: GraphContract) -> dict[str, str]:
    """A graph's metadata, with the digest's place kept free for `signed`."""
    names = contract.categories.name_of_label
    description = (
        f"Detector ({contract.task}) of {len(names)} categories, exported for {contract.target} in "
        f"{contract.precision}; images {contract.input_dtype} {list(contract.input_shape)}, RGB."
    )
    return {
        "names": json.dumps(names),
        "description": description,
        METADATA_KEY: json.dumps(contract.to_json()),
        DIGEST_KEY: UNSIGNED,
    }


def read_contract(path: str | Path) -> GraphContract:
    """The contract in an exported file's metadata.

    Raises:
        UserError: the file is missing, is not ONNX, was not written by `export_onnx`, or was changed since.
    """
    import onnx
    from google.protobuf.message import DecodeError

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        model = onnx.load_model(path, load_external_data=False)
    except DecodeError as error:
        raise UserError(f"{path}: not an ONNX file") from error
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            check_digest(path)
            return GraphContract.parse(entry.value, str(path))
    raise UserError(f"{path}: no '{METADATA_KEY}' metadata; export it with this package")


def translate(detector: StaticRCNN) -> torch.onnx.ONNXProgram:
    """Run torch's exporter; the program's outputs have their names, stage tensors included."""
    names: list[str] = []
    wrapped = _WithStages(detector, names).eval()
    settings = detector.settings
    height, width = settings.input_size or settings.image_size
    if settings.input_dtype == "uint8":
        example = torch.zeros(settings.batch, height, width, 3, dtype=torch.uint8)
    else:
        example = torch.zeros(settings.batch, 3, height, width)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(wrapped, (example,), strict=False)
        with quiet("torch.onnx"):
            program = torch.onnx.export(
                exported,
                input_names=[INPUT_NAME],
                output_names=names,
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
                custom_translation_table={torch.ops.norton_deploy.nms_keep.default: nms_keep_in_onnx},
            )
    assert program is not None
    return program


def simplify(model: Any) -> None:
    """Fold constants, merge equal subgraphs and drop what is unused, in place.

    The exporter's own optimizer would also try some hundred rewrite rules on every node: 10 s for nothing here,
    since ONNX Runtime and TensorRT rewrite the graph again when they load it.
    """
    import onnx_ir.passes.common as passes
    from onnxscript.optimizer import fold_constants

    passes.InlinePass()(model)
    fold_constants(model)
    for simplification in (
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.OutputFixPass(),
    ):
        with quiet("onnx_ir"):
            simplification(model)


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """Let a logger through with errors only: the exporter's warnings speak to its own developers."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def nms_keep_in_onnx(boxes: Any, valid: Any, groups: Any, group_count: int, iou_threshold: float) -> Any:
    """ONNX form of `norton_deploy.export.static_boxes.nms_native`, for the exporter's translation table."""
    import numpy as np
    from onnxscript import opset20 as op

    count = boxes.shape[1]
    axis, image_and_box = _constant(np.array([1])), _constant(np.array([0, 2]))
    first_column = _constant(np.array(0))
    zero, one_zero = _constant(np.array(0, np.float32)), _constant(np.zeros(1, np.float32))
    each_group = _constant(np.arange(group_count).reshape(1, group_count, 1))
    falling = _constant(np.arange(count, 0, -1, dtype=np.float32).reshape(1, 1, count))
    member = op.And(op.Equal(op.Unsqueeze(groups, axis), each_group), op.Unsqueeze(valid, axis))
    scores = op.Where(member, falling, zero)
    threshold = _constant(np.array([iou_threshold], np.float32))
    selected: Any = op.NonMaxSuppression(boxes, scores, _constant(np.array([count])), threshold, one_zero)
    kept = op.GreaterOrEqual(op.Gather(selected, first_column, axis=1), first_column)
    nothing = op.And(valid, op.Not(valid))
    return op.ScatterND(nothing, op.Gather(selected, image_and_box, axis=1), kept)


def _constant(values: Any) -> Any:
    from onnx import numpy_helper
    from onnxscript import opset20 as op

    return op.Constant(value=numpy_helper.from_array(values))


def _output_tensor(value: Any) -> OutputTensor:
    dtype = str(value.dtype).rpartition(".")[2].lower()
    return OutputTensor(str(value.name), dtype, tuple(int(side) for side in value.shape))
