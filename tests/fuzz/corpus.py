"""Inputs that once crashed, hung, or ended in a traceback or a wrong result: all must be refused."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
import yaml

from norton_deploy.checkpoints.checkpoint import tensors_digest
from norton_deploy.structures import METADATA_KEY
from tests.fuzz.inputs import CLASSIFIER, DETECTRON2

POINTS = [0] * 51


def coco(**changes: Any) -> bytes:
    """One image, one annotation; the changes are to it, or to the image or category under their names."""
    image = {"id": 3, "file_name": "3.png", "height": 16, "width": 20} | changes.pop("image", {})
    category = {"id": 1, "name": "person", "keypoints": []} | changes.pop("category", {})
    annotation = {
        "id": 1,
        "image_id": 3,
        "category_id": 1,
        "bbox": [2, 2, 10, 7],
        "area": 70.0,
        "iscrowd": 0,
        "segmentation": [[2, 2, 12, 2, 12, 9]],
        "keypoints": POINTS,
        "num_keypoints": 0,
    } | changes
    return json.dumps({"images": [image], "annotations": [annotation], "categories": [category]}).encode()


def header(**changes: Any) -> bytes:
    """A checkpoint whose header is changed and whose digest is right."""
    tensors = {"fc.bias": torch.zeros(2)}
    content = CLASSIFIER.to_dict() | changes
    content["digest"] = tensors_digest(tensors, json.dumps(content, sort_keys=True).encode())
    return safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(content)})


def detectron2_config(layers: float) -> dict[str, Any]:
    """A sound configuration but for the number of the mask head's layers."""
    model = DETECTRON2["MODEL"]
    return {**DETECTRON2, "MODEL": {**model, "ROI_MASK_HEAD": {**model["ROI_MASK_HEAD"], "NUM_CONV": layers}}}


def pth(content: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes that says it has 30,000 x 30,000 pixels."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(bytes(9**6)))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def shared_containers() -> bytes:
    value: Any = []
    for _ in range(60):
        value = [value, value]
    return pickle.dumps({"model": {"a": value, "b": {1, 2}}})


NAN, INF = float("nan"), float("inf")
CORPUS: dict[str, tuple[str, bytes | Callable[[], bytes]]] = {
    **{
        f"polygon of {number!r:.12}": (
            "coco",
            lambda number=number: coco(segmentation=[[number, 1, 2, 3, 4, 5]], area=None),
        )
        for number in (NAN, INF, -INF, 1e308, -1e308, 1e10, 2**31, 10**400)
    },
    **{
        f"run lengths {counts!r:.12}": (
            "coco",
            lambda counts=counts: coco(area=-1, segmentation={"counts": counts, "size": [16, 20]}),
        )
        for counts in ("", "0", "11111111", None, [-1, 321], [10**400])
    },
    "size null": ("coco", lambda: coco(area=-1, segmentation={"counts": [320], "size": None})),
    "height negative": ("coco", lambda: coco(image={"height": -16})),
    "width null": ("coco", lambda: coco(image={"width": None})),
    "id 10**400": ("coco", lambda: coco(id=10**400)),
    "file name with ..": ("coco", lambda: coco(image={"file_name": "../val2017/3.png"})),
    "file name absolute": ("coco", lambda: coco(image={"file_name": "/etc/passwd"})),
    "category without a name": ("coco", lambda: coco(category={"name": ""})),
    "deep JSON": ("coco", b"[" * 100_000),
    "JSON with endless integer": ("coco", b'{"images": ' + b"1" * 10_000 + b"}"),
    "image bomb": ("picture", bomb),
    "plan with a date": ("plan", b"architecture: resnet18\nranks: {layer1.0.conv1: 2026-13-45}"),
    "plan with an endless integer": (
        "plan",
        b"architecture: resnet18\nranks: {layer1.0.conv1: " + b"9" * 10_000 + b"}",
    ),
    "plan with a key that is a number": ("plan", b"architecture: resnet18\nranks: {1: 2}"),
    "plan of aliases": (
        "plan",
        b"a: &a [1]\n"
        + b"".join(b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (n, n, n - 1, n - 1, n - 1, n - 1) for n in range(98, 123)),
    ),
    "configuration with nan": ("config", b"num_classes: 3\nroi: {score_threshold: .nan}"),
    "no layers in a head": ("config", b"num_classes: 3\nroi: {mask_channels: []}"),
    **{
        f"mask head of {layers} layers": (
            "detectron2",
            lambda layers=layers: yaml.safe_dump(detectron2_config(layers)).encode(),
        )
        for layers in (0.5, 10**12)
    },
    "header null": ("checkpoint", lambda: safetensors.torch.save({"a": torch.zeros(1)}, {METADATA_KEY: "null"})),
    "label Infinity": ("checkpoint", lambda: header(categories=[{"label": INF, "id": 1, "name": "a"}])),
    "lineage null": ("checkpoint", lambda: header(lineage=None)),
    "settings null": ("checkpoint", lambda: header(settings=None)),
    "classes without end": ("checkpoint", lambda: header(settings={"architecture": "resnet18", "num_classes": 10**12})),
    "rank without end": (
        "checkpoint",
        lambda: header(plan={"architecture": "resnet18", "ranks": {"layer1.0.conv1": 10**9}}),
    ),
    "broken safetensors": ("checkpoint", b"\xff" * 64),
    "zero-byte .pth": ("state_dict", b""),
    "an old layer's name without its number": (
        "state_dict",
        lambda: pth({"roi_heads.mask_head.mask_fcnx.weight": torch.zeros(1)}),
    ),
    "integer keys": ("state_dict", lambda: pth({1: torch.zeros(1)})),
    "a view of a terabyte": ("state_dict", lambda: pth({"fc.weight": torch.zeros(1).expand(2**38)})),
    "rows without columns": (
        "state_dict",
        lambda: pth(
            {
                "features.0.weight": torch.zeros(1),
                "features.1.weight": torch.zeros(1),
                "classifier.3.weight": torch.zeros(10**9, 0),
            }
        ),
    ),
    "manifest null": ("manifest", b"null"),
    "settings.json cut off": ("settings", b'{"seed": 0, '),
    "settings.json null": ("settings", b"null"),
    "state with fields missing": ("state", lambda: pth({"format": 2, "step": 3})),
    "state whose identity is null": (
        "state",
        lambda: pth(
            {
                "format": 2,
                "step": 3,
                "epoch": 0,
                "batch": 0,
                "best": None,
                "evaluated_step": -1,
                "metrics": {},
                "identity": None,
                "model": {},
                "optimizer": {},
                "scaler": None,
            }
        ),
    ),
    "shared containers": ("pickle", shared_containers),
    "pickle with bytes that are not there": ("pickle", b"\x80\x05\x96" + (2**33).to_bytes(8, "little") + b"abc."),
    "pickle with a place far away": ("pickle", b"\x80\x02Nr\xff\xff\xff\x7f0."),
    "YOLO's polygon with a corner far away": ("yolo", b"1 0.1 0.1 1e30 0.1 0.9 0.8"),
    "YOLO's data.yaml that is none": ("yolo_names", b"names: {0: cat, 1: dog"),
    "VOC without an object": ("voc", b"<annotation></annotation>"),
    "VOC's box of no number": (
        "voc",
        b"<annotation><object><name>cat</name><bndbox><xmin>nan</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"
        b"</object></annotation>",
    ),
    "references that are no archive": ("references", b"PK\x03\x04" + bytes(30)),
}
"""What it is -> (kind of input, its bytes)."""
