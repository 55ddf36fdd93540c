"""What reads each kind of input, and what must hold of everything that it accepts."""

from __future__ import annotations

import math
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.compression.compress import build_classifier, fit_plan
from norton_deploy.config import from_mapping, read_yaml
from norton_deploy.data.category_list import read_categories
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.image_file import check_decodes, read_image, sizes_of
from norton_deploy.data.import_layout import FOLDERS, Layout, import_dataset
from norton_deploy.data.resident_images import read_resident_images
from norton_deploy.detectron2.config import read_config
from norton_deploy.detectron2.pickle import read_pickle
from norton_deploy.errors import UserError
from norton_deploy.export.tensorrt_build import EngineManifest, manifest_path
from norton_deploy.files import path_below, path_component
from norton_deploy.inference.loading import load_predictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.parity.verification import ReferenceFile, reference_path, verify
from norton_deploy.training.run_folder import RunFolder, load_state
from tests.inference.conftest import write_graph

MODEL = build_classifier(ClassifierSettings("resnet18", 2))


class BrokenPromiseError(AssertionError):
    """An input was neither read correctly nor refused as it should be."""


def require(holds: bool, what: str) -> None:
    if not holds:
        raise BrokenPromiseError(what)


def read_coco(content: bytes, folder: Path) -> None:
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "val2017").mkdir(exist_ok=True)
    for name in ("3.png", "5.png"):
        if not (folder / "val2017" / name).exists():
            Image.new("RGB", (20, 16)).save(folder / "val2017" / name)
    refused: UserError | None = None
    for task in ("box", "mask", "keypoint"):
        stem = "person_keypoints" if task == "keypoint" else "instances"
        (folder / "annotations" / f"{stem}_val2017.json").write_bytes(content)
        for skip_bad in (False, True):
            try:
                data = CocoDetection(folder, "val", task, skip_bad=skip_bad)  # type: ignore[arg-type]
            except UserError as error:
                check_message(error, f"{stem}_val2017.json")
                refused = error
                continue
            _check_dataset(data, task)
    if refused is not None:
        raise refused


def _check_dataset(data: CocoDetection, task: str) -> None:
    for index in range(len(data)):
        image, target = data[index]
        height, width = image.shape[1:]
        boxes = target["boxes"].numpy()
        require(bool(np.isfinite(boxes).all()), "a box is not finite")
        require(bool((boxes >= 0).all() and (boxes <= [width, height, width, height]).all()), "a box lies outside")
        require(set(target["labels"].tolist()) <= set(data.categories.labels), "a label is no category's")
        if task == "mask":
            masks = target["masks"].numpy()
            require(masks.shape == (len(boxes), height, width) and masks.max(initial=0) <= 1, "a mask is no mask")
        if task == "keypoint":
            require(bool(np.isfinite(target["keypoints"].numpy()).all()), "a keypoint is not finite")
    truth = data.coco
    for entry in truth.anns.values():  # what evaluation does
        if task == "mask":
            mask = coco_mask.decode(truth.annToRLE(entry))
            size = truth.imgs[entry["image_id"]]
            require(mask.shape == (size["height"], size["width"]) and mask.max(initial=0) <= 1, "pycocotools' mask")


def read_picture(content: bytes, folder: Path) -> None:
    path = folder / "a.jpg"
    path.write_bytes(content)
    pixels = read_image(path)
    require(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3, "no RGB image")
    require(pixels.shape[:2] == sizes_of(path)[0], "the announced size is not the decoded one")
    check_decodes(path)


def read_plan(content: bytes, folder: Path) -> None:
    path = folder / "plan.yaml"
    path.write_bytes(content)
    plan = CompressionPlan.load(path)
    require(CompressionPlan.from_dict(plan.to_dict(), str(path)) == plan, "a plan is not what it was written as")
    fit_plan(MODEL, plan)


def read_config_file(content: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    settings = from_mapping(DetectorSettings, read_yaml(path), str(path))
    _check_numbers(asdict(settings))


def read_detectron2(content: bytes, folder: Path) -> None:
    path = folder / "config.yaml"
    path.write_bytes(content)
    config = read_config(path)
    _check_numbers(asdict(config.settings()))
    require(config.task in ("box", "mask", "keypoint"), "no task")


def _check_numbers(values: Any) -> None:
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | tuple | list):
            _check_numbers(value)
        elif isinstance(value, float):
            require(math.isfinite(value), "a setting is not finite")


def read_checkpoint(content: bytes, folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(content)
    load_checkpoint(path)
    raise BrokenPromiseError("a checkpoint without its tensors was loaded")


def read_state_dict(content: bytes, folder: Path) -> None:
    path = folder / "model.pth"
    path.write_bytes(content)
    open_model(str(path))
    raise BrokenPromiseError("a model without its tensors was loaded")


def read_graph(content: bytes, folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(content)
    predictor = load_predictor(path, device="cpu")
    image = np.zeros((32, 48, 3), np.uint8)
    image[5:20, 10:30] = 255
    try:
        found = predictor([image])[0]
    except UserError as error:
        check_message(error, path.name)
        return
    require(bool(np.isfinite(found.boxes).all()), "a box is not finite")
    require(set(found.labels.tolist()) <= set(predictor.categories.labels), "a label is no category's")


def read_manifest(content: bytes, folder: Path) -> None:
    engine = folder / "model.engine"
    engine.write_bytes(b"")
    manifest_path(engine).write_bytes(content)
    EngineManifest.load(engine)
    raise BrokenPromiseError("a manifest of another engine was accepted")


def read_pickle_file(content: bytes, folder: Path) -> None:
    path = folder / "model.pkl"
    path.write_bytes(content)
    read_pickle(path)


def read_state(content: bytes, folder: Path) -> None:
    path = folder / "state.pt"
    path.write_bytes(content)
    state = load_state(path, {"seed": 0, "lr": 0.1})
    require(isinstance(state.step, int) and isinstance(state.model, dict), "a state without its fields was loaded")


def read_settings(content: bytes, folder: Path) -> None:
    (folder / "settings.json").write_bytes(content)
    RunFolder(folder).claim({"seed": 0, "lr": 0.1, "data": {"a": [1]}}, resume=True, overwrite=False)


def read_names(content: bytes, folder: Path) -> None:
    (folder / "names.txt").write_bytes(content)
    read_categories(folder / "names.txt")
    name = content.decode("utf-8", "surrogatepass")
    component = path_component(name)
    require(component not in (".", "..") and "/" not in component and "\0" not in component, f"component {component!r}")
    (folder / component).parent.samefile(folder)
    (folder / component).exists()
    try:
        below = path_below(folder, name)
    except UserError:
        return
    require(below.resolve().is_relative_to(folder.resolve()), f"path {below}")


def read_yolo(content: bytes, folder: Path) -> None:
    _read_layout("yolo", folder, {"labels/3.txt": content, "data.yaml": b"names: [cat, dog]"})


def read_yolo_names(content: bytes, folder: Path) -> None:
    _read_layout("yolo", folder, {"labels/3.txt": b"0 0.5 0.5 0.2 0.4", "data.yaml": content})


def read_voc(content: bytes, folder: Path) -> None:
    _read_layout("voc", folder, {"Annotations/3.xml": content})


def _read_layout(layout: Layout, folder: Path, files: dict[str, bytes]) -> None:
    """What is imported can be read by us."""
    images = folder / FOLDERS[layout][0]
    images.mkdir(exist_ok=True)
    Image.new("RGB", (20, 16)).save(images / "3.png")
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    shutil.rmtree(folder / "out", ignore_errors=True)
    import_dataset(layout, images, images, folder / "out", names=folder / "data.yaml")
    try:
        _check_dataset(CocoDetection(folder / "out", "train", "box"), "box")
    except UserError as error:
        raise BrokenPromiseError(f"an imported dataset is refused: {error}") from error


def read_references(content: bytes, folder: Path) -> None:
    graph = folder / "model.onnx"
    write_graph(graph)
    reference_path(graph).write_bytes(content)
    verify(load_predictor(graph, device="cpu"), ReferenceFile.load(reference_path(graph)))


def read_cifar(content: bytes, folder: Path) -> None:
    (folder / "batches.meta.txt").write_text("ant\nbee\ncat\n")
    for name in ("data_batch_1.bin", "test_batch.bin"):
        (folder / name).write_bytes(content)
    images = read_resident_images(folder, "val", image_size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
    require(images.pixels.shape == (len(images), 32, 32, 3) and int(images.labels.max()) < 3, "images or labels")


READERS: dict[str, tuple[Callable[[bytes, Path], None], str]] = {
    "coco": (read_coco, "val2017.json"),
    "picture": (read_picture, "a.jpg"),
    "plan": (read_plan, "plan.yaml"),
    "config": (read_config_file, "config.yaml"),
    "detectron2": (read_detectron2, "config.yaml"),
    "checkpoint": (read_checkpoint, "model.safetensors"),
    "state_dict": (read_state_dict, "model.pth"),
    "graph": (read_graph, "model.onnx"),
    "manifest": (read_manifest, "model.engine"),
    "pickle": (read_pickle_file, "model.pkl"),
    "state": (read_state, "state.pt"),
    "settings": (read_settings, "settings.json"),
    "names": (read_names, ""),
    "yolo": (read_yolo, "/"),
    "yolo_names": (read_yolo_names, "/"),
    "voc": (read_voc, "/"),
    "references": (read_references, "model"),
    "cifar": (read_cifar, "test_batch.bin"),
}
"""Kind of input -> what reads it (bytes, an own folder), and the file's name that an error must hold."""


def check_message(error: UserError, name: str) -> None:
    """An error is one printable line that names the file."""
    text = str(error)
    require(name in text, f"the error does not name {name}: {text}")
    require(bool(text) and len(text.splitlines()) == 1 and len(text) < 2000, f"the error is not one line: {text!r}")


def try_input(kind: str, content: bytes, folder: Path) -> bool:
    """Read one input; True if it was accepted, False if it was refused with a sound message.

    Raises:
        Exception: anything but a `UserError` that names the file: the promise is broken.
    """
    reader, name = READERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            reader(content, folder)
        except UserError as error:
            check_message(error, name)
            return False
    return True
