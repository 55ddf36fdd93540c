"""An exported graph or engine as a folder that a stranger can run: clients, labels, a model repository for Triton.

Templates are in artefact_files/. `detect.py` and the C++ sources are copied as they are; what is particular to a graph
is in `contract.h`, `config.pbtxt`, `labels.txt` and `README.md`, which are written from its contract.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from string import Template

from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.letterbox import PADDING_COLOUR
from norton_deploy.export.onnx_export import OUTPUT_MEANING, read_contract
from norton_deploy.export.tensorrt_build import EngineManifest, manifest_path
from norton_deploy.files import check_output_folder, new_folder

TEMPLATES = Path(__file__).with_name("artefact_files")
CONTRACT_FILE = "contract.json"
"""Its presence shows that a folder is an artefact, which `--overwrite` may replace."""
BYTES = {"uint8": 1, "bool": 1, "float16": 2, "float": 4, "float32": 4, "int32": 4, "int64": 8}
TRITON_TYPE = {
    "uint8": "TYPE_UINT8", "bool": "TYPE_BOOL", "float16": "TYPE_FP16", "float": "TYPE_FP32", "float32": "TYPE_FP32",
    "int32": "TYPE_INT32", "int64": "TYPE_INT64",
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """What an artefact is made from.

    Attributes:
        file: the graph (.onnx) or the engine (.engine).
        engine: "" for a graph, else "tensorrt" or "tensorrt-rtx".
    """

    file: Path
    contract: GraphContract
    engine: str

    @classmethod
    def open(cls, file: str | Path) -> "Source":
        """
        Raises:
            UserError: neither a graph nor an engine of this package.
        """
        path = Path(file)
        if path.suffix == ".onnx":
            return cls(path, read_contract(path), "")
        if path.suffix == ".engine":
            manifest = EngineManifest.load(path)
            return cls(path, manifest.contract, manifest.engine)
        raise UserError(f"{path}: an artefact is made from a graph (.onnx) or an engine (.engine)")


def check_artefact_folder(folder: Path, *, overwrite: bool) -> None:
    """Say before the work that an artefact cannot be written to a folder.

    Raises:
        UserError: it holds something; with `overwrite`: something else than an artefact.
    """
    check_output_folder(folder, replaces=CONTRACT_FILE if overwrite else None)


def write_artefact(folder: str | Path, model: str | Path, *, overwrite: bool = False) -> Path:
    """Write everything that is needed to run an exported detector, whole or not at all.

    Args:
        folder: to make. It gets model.onnx or model.engine (with its manifest), contract.json, labels.txt, README.md,
            python/ (a graph's), cpp/ and triton/ (not TensorRT-RTX's).
        model: a checked graph (.onnx) or a built engine (.engine, its manifest beside it).
        overwrite: whether to replace an earlier artefact.

    Returns:
        The graph or engine in the folder.

    Raises:
        UserError: no graph or engine of this package, or the folder holds something else.
    """
    source = Source.open(model)
    name = f"model{source.file.suffix}"
    with new_folder(folder, replaces=CONTRACT_FILE if overwrite else None) as out:
        shutil.copyfile(source.file, out / name)
        if source.engine:
            shutil.copyfile(manifest_path(source.file), manifest_path(out / name))
        else:
            shutil.copytree(TEMPLATES / "python", out / "python", ignore=shutil.ignore_patterns("__pycache__"))
        references = source.file.with_suffix(".reference.npz")
        if references.is_file():
            shutil.copyfile(references, out / "model.reference.npz")
        (out / CONTRACT_FILE).write_text(json.dumps(source.contract.to_json(), indent=2) + "\n")
        (out / "labels.txt").write_text("\n".join(label_lines(source.contract)) + "\n")
        shutil.copytree(TEMPLATES / "cpp", out / "cpp")
        _fill("cpp/contract.h", out, _header_values(source.contract))
        if source.engine != "tensorrt-rtx":
            _write_triton(out / "triton" / "detector", out / name, source)
        _fill("README.md", out, _readme_values(source, name, sorted(path.name for path in out.iterdir())))
    return Path(folder) / name


def label_lines(contract: GraphContract) -> list[str]:
    """The name of each label from 0 on; "-" where the labels have a gap."""
    names = {0: "background"} | contract.categories.name_of_label
    return [names.get(label, "-") for label in range(contract.categories.num_classes)]


def _fill(template: str, out: Path, values: Mapping[str, object], target: str | None = None) -> None:
    text = Template((TEMPLATES / template).read_text()).substitute(values)
    (out / (target or template)).write_text(text)


def _header_values(contract: GraphContract) -> dict[str, object]:
    """Of cpp/contract.h."""
    outputs = [output for output in contract.outputs if output.name in contract.output_names]
    names = contract.categories.name_of_label.items()
    return {
        "height": contract.input_size[0],
        "width": contract.input_size[1],
        "uint8_input": json.dumps(contract.input_dtype == "uint8"),
        "letterbox": json.dumps(contract.resize == "letterbox"),
        "input_name": contract.input_name,
        "input_shape": _commas(contract.input_shape),
        "input_bytes": prod(contract.input_shape) * BYTES[contract.input_dtype],
        "padding_colour": _commas(PADDING_COLOUR),
        "output_count": len(outputs),
        "outputs": "\n".join(
            f'    {{"{output.name}", {prod(output.shape) * BYTES[output.dtype]}}},'
            f"  // {output.dtype} [{_commas(output.shape)}]: {OUTPUT_MEANING[output.name]}"
            for output in outputs
        ),
        "names": "\n".join(f"    {{{label}, {json.dumps(name, ensure_ascii=False)}}}," for label, name in names),
    }


def _write_triton(folder: Path, model: Path, source: Source) -> None:
    """A model of a Triton repository; its version 1 is the same file as `model`, by a hard link where there are any."""
    contract, version = source.contract, folder / "1"
    version.mkdir(parents=True)
    target = version / ("model.plan" if source.engine else "model.onnx")
    try:
        os.link(model, target)
    except OSError:
        shutil.copyfile(model, target)
    values = {
        "batch": contract.batch,
        "platform": 'platform: "tensorrt_plan"' if source.engine else 'backend: "onnxruntime"',
        "input_name": contract.input_name,
        "input_type": TRITON_TYPE[contract.input_dtype],
        "input_shape": _commas(contract.input_shape),
        "outputs": ",\n".join(
            f'  {{ name: "{output.name}" data_type: {TRITON_TYPE[output.dtype]} dims: [ {_commas(output.shape)} ] }}'
            for output in contract.outputs
        ),
        "kind": "KIND_GPU" if source.engine else "KIND_AUTO",
    }
    _fill("config.pbtxt", folder, values)


def _commas(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))


FILES = {
    "model.onnx": "the graph; `load_predictor` of norton_deploy opens it, or this folder",
    "model.engine": "the engine, for the GPU and the version that `model.engine.json` names",
    "model.engine.json": "what the engine was built by and for, and its SHA-256",
    "model.reference.npz": "images and what is in them; `norton verify_engine` compares",
    CONTRACT_FILE: "what goes in and comes out, for programs",
    "labels.txt": "the names of the labels",
    "python": "a client that needs ONNX Runtime and NumPy (Pillow reads the picture)",
    "cpp": "a client with CMake, for ONNX Runtime or TensorRT; it needs nothing else",
    "triton": "a model repository for Triton Inference Server",
}


RESIZING = {
    "letterbox": "A picture of another size is scaled to fit, its aspect kept, into the top left corner; the rest is "
    f"RGB {', '.join(map(str, PADDING_COLOUR))}. Boxes are in the input's pixels.",
    "graph": "Frames have exactly this size; the graph scales them itself. Boxes are in their pixels.",
    "none": "Pictures have exactly this size.",
}
PYTHON_USAGE = """## Python

    pip install onnxruntime numpy pillow
    python python/detect.py PICTURE.jpg

"""
TENSORRT_USAGE = """## TensorRT

    pip install norton-deploy tensorrt        # or tensorrt_rtx, and --engine tensorrt-rtx
    norton export_trt --onnx model.onnx --engine tensorrt --out model.engine

On the target this builds the engine and compares what it finds with `model.reference.npz`.

"""
CPP_USAGE = """## C++

    cmake -S cpp -B cpp/build{option}
    cmake --build cpp/build
    cpp/build/detect {name} PICTURE.ppm

DIR is an unpacked release of {package}; leave that option out where it is installed. ImageMagick's `convert` makes a
PPM.

"""
CPP_BUILD = {
    "": {"option": " -DONNXRUNTIME_ROOT=DIR", "package": "ONNX Runtime"},
    "tensorrt": {"option": " -DENGINE=tensorrt -DTENSORRT_ROOT=DIR", "package": "TensorRT"},
    "tensorrt-rtx": {
        "option": " -DENGINE=tensorrt -DTENSORRT_NAME=tensorrt_rtx -DTENSORRT_ROOT=DIR",
        "package": "TensorRT-RTX",
    },
}
TRITON_USAGE = """## Triton

    tritonserver --model-repository=$PWD/triton

`config.pbtxt` has shapes and a warm-up. It was checked against Triton's schema and not run by those who wrote it.

"""


def _readme_values(source: Source, name: str, entries: list[str]) -> dict[str, object]:
    contract = source.contract
    usage = "" if source.engine else PYTHON_USAGE
    usage += TENSORRT_USAGE if contract.target == "tensorrt" and not source.engine else ""
    usage += CPP_USAGE.format(name=name, **CPP_BUILD[source.engine])
    usage += "" if source.engine == "tensorrt-rtx" else TRITON_USAGE
    return {
        "title": f"Detector: {contract.task}",
        "summary": f"Made by norton_deploy: {source.engine or f'an ONNX graph for {contract.target}'}, "
        f"{contract.precision}, {len(contract.categories.labels)} categories, at most {contract.max_detections} "
        f"detections an image of score {contract.score_threshold} or more.",
        "files": "\n".join(f"| `{entry}` | {FILES[entry]} |" for entry in entries),
        "input_name": contract.input_name,
        "input": f"{contract.input_dtype} [{_commas(contract.input_shape)}], RGB"
        + ("" if contract.input_dtype == "uint8" else ", 0..1"),
        "resize": RESIZING[contract.resize],
        "batch_note": f"{contract.batch} image(s) a run",
        "outputs": "\n".join(
            f"| `{output.name}` | {output.dtype} | {_commas(output.shape)} | {OUTPUT_MEANING[output.name]} |"
            for output in contract.outputs
        ),
        "usage": usage.rstrip("\n"),
        "height": contract.input_size[0],
        "width": contract.input_size[1],
        "padding_colour": _commas(PADDING_COLOUR),
    }
