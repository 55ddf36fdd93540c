"""Deliberate alterations of exported graphs, each of which changes what is detected, as functions of the ONNX model."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from norton_deploy.export.graph_digest import DIGEST_KEY, UNSIGNED, signed
from norton_deploy.structures import METADATA_KEY

Alteration = Callable[[onnx.ModelProto], None]


def save_signed(model: onnx.ModelProto, path: Path) -> None:
    """As somebody who wants the file to be taken for a sound one."""
    for entry in model.metadata_props:
        if entry.key == DIGEST_KEY:
            entry.value = UNSIGNED
    path.write_bytes(signed(model.SerializeToString()))


def after(tensor: str, operator: str, value: Any, model: onnx.ModelProto) -> None:
    """Apply `operator` with a constant to a tensor before anybody reads it."""
    graph = model.graph
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == tensor:
                node.output[index] = "before_it"
                place = list(graph.node).index(node)
    graph.initializer.append(numpy_helper.from_array(np.asarray(value), "a_constant"))
    graph.node.insert(place + 1, helper.make_node(operator, ["before_it", "a_constant"], [tensor]))


def column(index: int, width: int, value: float) -> np.ndarray:
    """`value` in one of the last axis's places, 0 elsewhere."""
    row = np.zeros(width, np.float32)
    row[index] = value
    return row


def weights(part: str, change: Callable[[np.ndarray], np.ndarray], model: onnx.ModelProto) -> None:
    """Change the first weight tensor whose name has `part`."""
    tensor = next(t for t in model.graph.initializer if part in t.name and np.prod(t.dims) > 2)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(change(values.copy()).astype(values.dtype), tensor.name))


def scalar(old: float, new: float, which: int, model: onnx.ModelProto) -> None:
    """Change the `which`-th scalar constant of a value."""
    found = [
        tensor
        for tensor in model.graph.initializer
        if np.prod(tensor.dims) == 1
        and tensor.data_type == onnx.TensorProto.FLOAT
        and np.isclose(numpy_helper.to_array(tensor).item(), old, rtol=1e-6)
    ]
    tensor = found[which]
    tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), new, np.float32), tensor.name))


def metadata(field: str, change: Callable[[Any], Any], model: onnx.ModelProto) -> None:
    """Change an entry of the contract."""
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    contract = json.loads(entry.value)
    contract[field] = change(contract[field])
    entry.value = json.dumps(contract)


def swapped(categories: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Two names the other way round."""
    names = categories["names"]
    return categories | {"names": [names[1], names[0], *names[2:]]}


def one_larger(values: np.ndarray) -> np.ndarray:
    """One output channel of a layer 5 % larger."""
    values[len(values) // 2] *= 1.05
    return values


COMMON: dict[str, Alteration] = {
    "boxes + 0.5 px": partial(after, "boxes", "Add", np.float32(0.5)),
    "boxes right edge + 0.2 px": partial(after, "boxes", "Add", column(2, 4, 0.2)),
    "boxes x 1.01": partial(after, "boxes", "Mul", np.float32(1.01)),
    "scores x 0.9": partial(after, "scores", "Mul", np.float32(0.9)),
    "scores + 0.001": partial(after, "scores", "Add", np.float32(0.001)),
    "labels + 1": partial(after, "labels", "Add", np.int32(1)),
    "one detection too few": partial(after, "num_detections", "Sub", np.int32(1)),
    "score threshold 0.06": partial(scalar, 0.05, 0.06, 0),
    "box NMS threshold 0.55": partial(scalar, 0.5, 0.55, -1),
    "RPN NMS threshold 0.6": partial(scalar, 0.7, 0.6, 0),
    "pixel scale x 1.01": partial(weights, "scale", lambda values: values * 1.01),
    "pixel mean + 1 level": partial(weights, "shift", lambda values: values + 1 / 58),
    "red and blue swapped": partial(weights, "scale", lambda values: values[::-1] * np.float32(1.001)),
    "first layer x 1.001": partial(weights, "body.conv1", lambda values: values * 1.001),
    "one channel of layer 2": partial(weights, "body.layer2.0.conv1", one_larger),
    "one channel of layer 4": partial(weights, "body.layer4.1.conv2", one_larger),
    "pyramid": partial(weights, "fpn.layer_blocks", one_larger),
    "RPN head": partial(weights, "rpn.head.conv", one_larger),
    "RPN logits": partial(weights, "rpn.head.cls_logits", one_larger),
    "RPN deltas": partial(weights, "rpn.head.bbox_pred", one_larger),
    "fc6": partial(weights, "fc6", one_larger),
    "fc7": partial(weights, "fc7", one_larger),
    "class logits": partial(weights, "cls_score", one_larger),
    "box deltas": partial(weights, "bbox_pred", lambda values: values * 1.02),
    "metadata: two categories swapped": partial(metadata, "categories", swapped),
    "metadata: score threshold": partial(metadata, "score_threshold", lambda value: value + 0.2),
    "metadata: precision, for its limits": partial(metadata, "precision", lambda value: "fp16"),
    "metadata: weights digest": partial(metadata, "weights_sha256", lambda value: "0" * 64),
    "metadata: mask paste": partial(metadata, "mask_paste", lambda value: "subpixel"),
    "metadata: fewer detections": partial(metadata, "max_detections", lambda value: value - 1),
}
MASK: dict[str, Alteration] = {
    "masks x 0.95": partial(after, "masks", "Mul", np.float32(0.95)),
    "masks + 0.01": partial(after, "masks", "Add", np.float32(0.01)),
    "mask head": partial(weights, "mask_head", one_larger),
}
KEYPOINT: dict[str, Alteration] = {
    "keypoints + 0.5 px": partial(after, "keypoints", "Add", column(0, 3, 0.5)),
    "keypoints + 2 px": partial(after, "keypoints", "Add", column(1, 3, 2.0)),
    "keypoint scores x 0.9": partial(after, "keypoints", "Mul", np.array([1, 1, 0.9], np.float32)),
    "keypoint head": partial(weights, "keypoint_head", one_larger),
}
