"""What strangers' files may hold: strategies for damaged and malicious inputs of each kind, as bytes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, class_categories, tensors_digest
from norton_deploy.export.graph_digest import DIGEST_KEY, UNSIGNED, signed
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.structures import METADATA_KEY, Categories
from tests.inference.conftest import write_graph


def _deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


NASTY: list[Any] = [
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    17,
    2**31,
    -(2**31),
    2**53,
    2**63,
    10**12,
    10**400,
    -(10**400),
    0.5,
    -0.0,
    1e10,
    1e308,
    -1e308,
    5e-324,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "0",
    "11111111",
    "PPPP",
    "nan",
    "a\0b",
    "../x",
    "/etc/passwd",
    ".",
    "\ud800",
    "x" * 300,
    "\x1b[31m\n",
    [],
    {},
    [[]],
    [None],
    [1] * 60,
    {"a": {}},
    [float("nan")] * 6,
    _deep(60),
    _deep(300),
]


def _places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything below a value."""
    found, left = [], [value]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else range(len(container))
        found += [(container, key) for key in keys]
        left += [container[key] for key in keys if isinstance(container[key], dict | list)]
    return found


def mutate(document: Any, rng: random.Random, times: int) -> Any:
    """A copy in which values were replaced, deleted, repeated, moved, or got other keys beside them."""
    document = copy.deepcopy(document)
    for _ in range(times):
        places = _places(document)
        if not places:
            break
        container, key = rng.choice(places)
        action = rng.randrange(6)
        if action <= 2:
            container[key] = copy.deepcopy(rng.choice(NASTY))
        elif action == 3:
            del container[key]
        elif action == 4 and isinstance(container, list):
            container.insert(key, copy.deepcopy(container[key]))
        elif action == 4:
            container[rng.choice(["extra", "", "id", "a" * 50])] = copy.deepcopy(rng.choice(NASTY))
        else:
            other, place = rng.choice(places)
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = copy.deepcopy(other[place])
    return document


def damage(content: bytes, rng: random.Random, times: int) -> bytes:
    """A copy with bytes flipped, cut off, cut out, doubled, or overwritten by large numbers."""
    data = bytearray(content)
    for _ in range(times):
        if not data:
            break
        at, length = rng.randrange(len(data)), rng.randrange(1, 9)
        action = rng.randrange(6)
        if action == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[at:]
        elif action == 2:
            del data[at : at + length]
        elif action == 3:
            data[at:at] = data[at : at + 16 * length]
        elif action == 4:
            data[at : at + length] = bytes(rng.choice((0, 0xFF, 0x7F, 0x80)) for _ in range(length))
        else:
            data[at : at + length] = rng.randbytes(length)
    return bytes(data)


def _json(value: Any, rng: random.Random) -> bytes:
    text = json.dumps(value, ensure_ascii=rng.random() < 0.8).encode("utf-8", "surrogatepass")
    return damage(text, rng, rng.choice((0, 0, 0, 0, 1, 2)))


def _coco(rng: random.Random) -> bytes:
    square = [[2.0, 2.0, 12.0, 2.0, 12.0, 9.0, 2.0, 9.0]]
    points = [0] * 51
    points[:6] = [3, 4, 2, 8, 8, 1]
    annotation = {
        "id": 1,
        "image_id": 3,
        "category_id": 1,
        "bbox": [2, 2, 10, 7],
        "area": 70.0,
        "iscrowd": 0,
        "segmentation": square,
        "keypoints": points,
        "num_keypoints": 2,
    }
    runs = {"counts": [0, 20, 300], "size": [16, 20]}
    packed = {"counts": "S26:0000000000000m3", "size": [16, 20]}
    document = {
        "images": [
            {"id": 3, "file_name": "3.png", "height": 16, "width": 20},
            {"id": 5, "file_name": "5.png", "height": 16, "width": 20},
        ],
        "annotations": [
            annotation,
            {**annotation, "id": 2, "segmentation": runs, "iscrowd": rng.randrange(2)},
            {**annotation, "id": 4, "image_id": 5, "category_id": 7, "segmentation": packed},
        ],
        "categories": [{"id": 1, "name": "person", "keypoints": ["nose"]}, {"id": 7, "name": "kite", "keypoints": []}],
    }
    if rng.random() < 0.2:  # numbers of every size in the places that reach C code
        document["annotations"][0]["segmentation"] = [
            [rng.choice((rng.uniform(-30, 50), rng.randrange(-9, 30))) for _ in range(rng.randrange(2, 12))]
        ]
        letters = "".join(chr(rng.randrange(40, 120)) for _ in range(rng.randrange(12)))
        document["annotations"][1]["segmentation"] = {"counts": letters, "size": [16, 20]}
    return _json(mutate(document, rng, rng.choice((0, 1, 1, 2, 3))), rng)


def pictures() -> list[bytes]:
    """Small sound pictures of every format."""
    pixels = np.arange(24 * 18 * 3, dtype=np.uint8).reshape(18, 24, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    made = []
    for kind, mode, options in [
        ("JPEG", "RGB", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "L", {"exif": exif}),
        ("PNG", "RGBA", {}),
        ("PNG", "P", {}),
        ("PNG", "1", {"exif": exif}),
        ("BMP", "RGB", {}),
        ("WEBP", "RGB", {}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("PPM", "RGB", {}),
        ("JPEG", "RGB", {"progressive": True}),
    ]:
        stream = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
        made.append(stream.getvalue())
    stream = io.BytesIO()
    Image.fromarray(np.arange(200, dtype=np.uint16).reshape(10, 20) * 300).save(stream, "PNG")
    return [*made, stream.getvalue()]


PICTURES = pictures()


def _picture(rng: random.Random) -> bytes:
    return damage(rng.choice(PICTURES), rng, rng.choice((0, 1, 1, 2, 4)))


PLAN = {
    "architecture": "resnet18",
    "note": "x",
    "ranks": {"layer1.0.conv1": 1, "layer2.0.conv2": 2},
    "keep": {"layer1.0.conv1": 40, "layer3": 200},
}
YAML_TRICKS = (
    "2026-13-45",
    "0x" + "f" * 5000,
    "9" * 10_000,
    "&a [*a, *a]",
    "!!python/object:os.system x",
    "? [a]\n: b",
    "1_0",
    "~",
    "2026-01-01",
    "!!binary =",
    "{" * 300,
    "<<: {a: 1}",
    "\t",
    ".inf",
    ".nan",
    "'\0'",
)


def _yaml(document: Any, rng: random.Random) -> bytes:
    changed = mutate(document, rng, rng.choice((0, 1, 1, 2)))
    try:
        text = yaml.safe_dump(changed, allow_unicode=True)
    except (RecursionError, ValueError):
        text = "a: 1"
    if rng.random() < 0.4:
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(YAML_TRICKS)}"
        text = "\n".join(lines)
    if rng.random() < 0.1:  # every level holds the one before nine times
        levels = [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else '1'}]" for n in range(rng.randrange(3, 30))]
        text = "\n".join(levels) + "\n" + text
    return damage(text.encode("utf-8", "surrogatepass"), rng, rng.choice((0, 0, 0, 1)))


CLASSIFIER = CheckpointHeader("cls", ClassifierSettings("resnet18", 2), None, class_categories(["cat", "dog"]))
DETECTOR = CheckpointHeader(
    "mask",
    DetectorSettings(
        num_classes=3,
        backbone=BackboneSettings("resnet18", fpn_channels=16),
        roi=RoiSettings(box_features=32),
        image=ImageSettings(64, 64),
    ),
    None,
    Categories((1, 2), (1, 37), ("person", "ball")),
)


def _checkpoint(rng: random.Random) -> bytes:
    header = mutate(rng.choice((CLASSIFIER, DETECTOR)).to_dict(), rng, rng.choice((1, 1, 2)))
    if isinstance(header, dict) and rng.random() < 0.3:
        header["plan"] = mutate(PLAN, rng, rng.randrange(3))
    tensors = {"fc.bias": torch.zeros(2), "fc.weight": torch.zeros(rng.choice((0, 2)), 512)}
    if isinstance(header, dict) and rng.random() < 0.9:  # a stranger knows how to make the digest
        header.pop("digest", None)
        header["digest"] = tensors_digest(tensors, json.dumps(header, sort_keys=True).encode())
    text = rng.choice((json.dumps(header),) * 8 + ("null", "[1]", "[" * 5000, "{", "1" * 5000))
    return damage(safetensors.torch.save(tensors, {METADATA_KEY: text}), rng, rng.choice((0, 0, 0, 1, 2)))


def _state_dict(rng: random.Random) -> bytes:
    weights: Any = {
        "fc.weight": torch.zeros(2, 512),
        "conv1.weight": torch.zeros(1),
        "layer3.0.conv1.weight": torch.zeros(1),
        "layer3.1.conv1.weight": torch.zeros(()),
        "roi_heads.box_predictor.cls_score.weight": torch.zeros(3, 4),
        "features.0.weight": torch.zeros(2),
    }
    for _ in range(rng.randrange(4)):
        weights.pop(rng.choice(list(weights)), None)
        value = rng.choice(
            (
                torch.zeros(()),
                torch.zeros(1).expand(2**40),
                torch.zeros(10**9, 0),
                torch.zeros(2, dtype=torch.complex64),
                3,
                torch.zeros(2, device="meta"),
                torch.eye(2).to_sparse(),
                None,
                "x",
                torch.zeros(3, dtype=torch.int8),
                {},
            )
        )
        weights[
            rng.choice(
                (
                    "fc.weight",
                    "conv1.weight",
                    "backbone.body.conv1.weight",
                    "layer3.",
                    7,
                    (1, 2),
                    None,
                    "",
                    "roi_heads.mask_head.mask_fcnx.weight",
                    "roi_heads.box_head.fc6.weight",
                )
            )
        ] = value
    content = rng.choice((weights, {"model": weights}, {"state_dict": weights, "epoch": 3}, [weights], 5, weights))
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=rng.random() < 0.8)
    return damage(stream.getvalue(), rng, rng.choice((0, 0, 0, 1, 2)))


def _graph(rng: random.Random) -> bytes:
    stream = io.BytesIO()
    write_graph(stream, task=rng.choice(("box", "mask", "keypoint")))  # type: ignore[arg-type]
    model = onnx.load_from_string(stream.getvalue())
    entry = next(entry for entry in model.metadata_props if entry.key == METADATA_KEY)
    if rng.random() < 0.7:
        entry.value = json.dumps(mutate(json.loads(entry.value), rng, rng.choice((1, 1, 2))))
        return _signed(model)
    if rng.random() < 0.5:
        entry.value = rng.choice(("", "null", "[" * 5000, "{", '{"format": 1}', '{"format": Infinity}'))
    return damage(rng.choice((_signed(model), model.SerializeToString())), rng, rng.choice((0, 1, 2, 3)))


def _signed(model: onnx.ModelProto) -> bytes:
    """The graph with its right digest: a stranger knows how to make it."""
    if all(entry.key != DIGEST_KEY for entry in model.metadata_props):
        model.metadata_props.add(key=DIGEST_KEY, value=UNSIGNED)
    return signed(model.SerializeToString())


MANIFEST = {
    "format": 1,
    "engine": "tensorrt",
    "engine_version": "10.8",
    "compute_capability": "86",
    "norton_deploy_version": "0",
    "graph_sha256": "0",
    "engine_sha256": "0",
}


def _manifest(rng: random.Random) -> bytes:
    stream = io.BytesIO()
    write_graph(stream)  # type: ignore[arg-type]
    model = onnx.load_from_string(stream.getvalue())
    contract = json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY))
    document = {**MANIFEST, "format": rng.choice((1, 2)), "contract": contract}
    return _json(mutate(document, rng, rng.choice((0, 1, 1, 2))), rng)


def _pickle(rng: random.Random) -> bytes:
    array = np.arange(6, dtype=rng.choice((np.float32, np.int64, ">f4"))).reshape(2, 3)
    weights: Any = {"a": array, "b": np.zeros((0, 2), np.float16), "c": array, "n": [1, (2.5, "x"), None]}
    shared: Any = [array]
    for _ in range(rng.choice((0, 0, 5, 40))):
        shared = [shared, shared]
    ring: list[Any] = [1]
    ring.append(rng.choice((ring, 2)))
    extra = rng.choice((shared, ring, _deep(90), {1: array}, OrderedDict(x=array), {(1,): 2}, {1, 2}, b"x", 1j, "y"))
    content = rng.choice((weights, {"model": {**weights, "extra": extra}}, {"model": OrderedDict(weights)}, extra))
    data = pickle.dumps(content, protocol=rng.randrange(6))
    if rng.random() < 0.1:  # counts of places and bytes that are not there
        data = rng.choice(
            (
                b"\x80\x02Nr\xff\xff\xff\x7f.",
                b"\x80\x04\x8e" + b"\xff" * 6 + b"\x00\x00.",
                b"\x80\x02(" * 999,
                b"cnumpy\ndtype\nN(NN}X\x05\x00\x00\x00dtypeK\x05ssb.",
            )
        )
    return damage(data, rng, rng.choice((0, 0, 1, 1, 2, 3)))


DETECTRON2 = yaml.safe_load((Path(__file__).parents[1] / "detectron2" / "configs" / "base.yaml").read_text())
DETECTRON2["MODEL"] |= {"MASK_ON": True, "PIXEL_STD": "(1.0, 1.0, 1.0)"}
RECIPE = {
    "num_classes": 3,
    "backbone": {"architecture": "resnet18", "norm_eps": 1e-5},
    "rpn": {"pre_nms": [20, 10]},
    "roi": {"mask_channels": [8, 8], "score_threshold": 0.1},
    "image": {"min_size": 64, "mean": [0.1, 0.2, 0.3]},
    "detectron2": {"level_strides": [4, 8, 16, 32, 64], "image_resize": "antialiased"},
}


STATE = {
    "format": 2,
    "step": 3,
    "epoch": 0,
    "batch": 3,
    "best": None,
    "evaluated_step": -1,
    "metrics": {},
    "identity": {"seed": 0, "lr": 0.1},
    "model": {},
    "optimizer": {},
    "scaler": None,
}


def _state(rng: random.Random) -> bytes:
    stream = io.BytesIO()
    try:
        torch.save(mutate(STATE, rng, rng.randrange(3)), stream)
    except RecursionError:  # torch cannot write what is nested so deeply
        torch.save(STATE, stream)
    return damage(stream.getvalue(), rng, rng.choice((0, 0, 1, 2)))


def _names(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
        return damage(b"person\nsports ball\nkite\n", rng, rng.randrange(4))
    pieces = ("/", "..", ".", "\0", " ", "_", "a", "B", "ä", "人", "~", "%", "\\", "x" * 90, "\ud800", "\n", "-", "C:")
    return "".join(rng.choice(pieces) for _ in range(rng.randrange(8))).encode("utf-8", "surrogatepass")


WORDS = ("", "0", "1", "-1", "0.5", "9", "1e999", "nan", "-0.2", "1e30", "9" * 5000, "1.5", "x", "\0", "\x85", "&#1;")


def _yolo(rng: random.Random) -> bytes:
    sound = ["0 0.5 0.5 0.2 0.4", "1 0.25 0.5 0.1 0.1", "1 0.1 0.1 0.9 0.1 0.9 0.8"]
    words = [line.split() for line in rng.sample(sound, rng.randrange(1, 4))]
    for _ in range(rng.randrange(3)):
        line = rng.choice(words)
        line[rng.randrange(len(line))] = rng.choice(WORDS)
    return damage("\n".join(map(" ".join, words)).encode(), rng, rng.choice((0, 0, 0, 1)))


def _voc(rng: random.Random) -> bytes:
    corners = {"xmin": "3", "ymin": "2", "xmax": "12", "ymax": "9"}
    for _ in range(rng.randrange(3)):
        corners[rng.choice(list(corners))] = rng.choice(WORDS)
    box = "".join(f"<{tag}>{text}</{tag}>" for tag, text in corners.items() if rng.random() < 0.98)
    bomb = '<!DOCTYPE a [<!ENTITY b "x"><!ENTITY c "&b;&b;"><!ENTITY d SYSTEM "file:///etc/passwd">]>'
    name = rng.choice(("cat", "cat", "dog", "", "../a", "&c;", "&d;", "x" * 5000))
    points = "<polygon><x1>3</x1><y1>2</y1><x2>9</x2><y2>2</y2><x3>9</x3><y3>8</y3></polygon>" * (rng.random() < 0.3)
    entry = f"<object><name>{name}</name><bndbox>{box}</bndbox>{points}</object>" * rng.randrange(3)
    text = f"{bomb if rng.random() < 0.2 else ''}<annotation>{entry}</annotation>"
    return damage(text.encode(), rng, rng.choice((0, 0, 0, 1)))


def _references(rng: random.Random) -> bytes:
    stream = io.BytesIO()
    write_graph(stream)  # type: ignore[arg-type]
    model = onnx.load_from_string(stream.getvalue())
    contract = json.loads(next(entry.value for entry in model.metadata_props if entry.key == METADATA_KEY))
    cuts = {"score_threshold": 0.05, "max_detections": 100}
    about = {"contract": contract, "precision": "fp32", "labels": [1, 2], "cuts": cuts, "by_probability": False}
    arrays: dict[str, Any] = {"0.frame": np.zeros((*contract["input_size"], 3), np.uint8)}
    arrays |= {"0.boxes": np.ones((2, 4), np.float32), "0.scores": np.ones(2, np.float32), "0.labels": np.ones(2, int)}
    arrays["0.sample"] = np.arange(2)
    for _ in range(rng.randrange(3)):
        name, shape = rng.choice(list(arrays)), rng.choice(((0,), (2,), (2, 3), (2, 4), (1, 1, 1)))
        arrays[name] = rng.choice(
            (np.full(shape, np.nan), np.zeros(shape, int), np.full(shape, 10**9), np.zeros(shape, "U3"))
        )
    text = _json(mutate(about, rng, rng.randrange(3)), rng).decode("utf-8", "replace")
    packed = io.BytesIO()
    np.savez_compressed(packed, about=np.array(text), **arrays)
    return damage(packed.getvalue(), rng, rng.choice((0, 0, 1)))


def _cifar(rng: random.Random) -> bytes:
    records = b"".join(bytes([rng.randrange(4)]) + rng.randbytes(3072) for _ in range(rng.randrange(3)))
    return damage(records, rng, rng.choice((0, 0, 1, 2)))


MAKERS: dict[str, Callable[[random.Random], bytes]] = {
    "coco": _coco,
    "picture": _picture,
    "plan": lambda rng: _yaml(PLAN, rng),
    "config": lambda rng: _yaml(RECIPE, rng),
    "detectron2": lambda rng: _yaml(DETECTRON2, rng),
    "checkpoint": _checkpoint,
    "state_dict": _state_dict,
    "graph": _graph,
    "manifest": _manifest,
    "pickle": _pickle,
    "state": _state,
    "settings": lambda rng: _json(mutate({"seed": 0, "lr": 0.1, "data": {"a": [1]}}, rng, rng.randrange(3)), rng),
    "names": _names,
    "yolo": _yolo,
    "yolo_names": lambda rng: _yaml({"names": {0: "cat", 1: "dog"}, "nc": 2, "train": "images"}, rng),
    "voc": _voc,
    "references": _references,
    "cifar": _cifar,
}
"""Kind of input -> what makes one of a random generator."""


def inputs(kind: str) -> st.SearchStrategy[bytes]:
    """Hypothesis' strategy for inputs of a kind; a case is named by its seed."""
    return st.integers(0, 2**32 - 1).map(lambda seed: MAKERS[kind](random.Random(seed)))
