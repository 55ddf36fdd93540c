"""Which model file needs which predictor, several graphs of one model as one, and the models in the package."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from norton_deploy.errors import UserError
from norton_deploy.inference.predictor import Backend, FloatType, Image, Predictor, StageTiming
from norton_deploy.structures import Categories, Detections

PackagedTask = Literal["mask", "keypoint"]
PACKAGED_FOLDER = Path(__file__).parents[1] / "checkpoints"
PACKAGED_TASKS: tuple[PackagedTask, ...] = get_args(PackagedTask)
BACKENDS_OF_SUFFIX: dict[str, tuple[Backend, ...]] = {
    ".safetensors": ("torch",),
    ".pth": ("torch",),
    ".pt": ("torch",),
    ".onnx": ("onnxruntime", "openvino"),
    ".engine": ("tensorrt",),
    ".pt2": ("aotinductor",),
    ".xml": ("openvino",),
}
"""What can run a kind of file; the first does unless another is asked for."""
OWN_OPTIONS: dict[Backend, set[str]] = {"torch": {"float_type"}, "openvino": {"float_type", "cache"}}


def load_predictor(
    path: str | Path | Sequence[str | Path],
    *,
    score_threshold: float | None = None,
    device: str | None = None,
    providers: Sequence[str] | None = None,
    categories: Path | Categories | None = None,
    backend: Backend | None = None,
    threads: int | None = None,
    float_type: FloatType | None = None,
    cache: Path | None = None,
    check: Callable[[Predictor], None] | None = None,
) -> Predictor:
    """Load a model file: a checkpoint (`.safetensors`), torchvision's weights (`.pth`), a graph (`.onnx`, OpenVINO's
    `.xml`), a TensorRT engine (`.engine`) or a package that torch compiled (`.pt2`).

    Args:
        path: one file; or several graphs or engines, or a folder of them, that differ in image size:
            each image then goes to the one whose aspect ratio is nearest.
        score_threshold: detections below it are dropped, 0..1; None keeps the model's own threshold.
        device: "cpu", "cuda" or "cuda:N"; by default a GPU if there is one. An engine needs a GPU.
        providers: ONNX Runtime's execution providers, in order of preference, e.g.
            ["CUDAExecutionProvider", "CPUExecutionProvider"]; by default those of `device`.
        categories: of a .pth file, which names none: see `open_model`.
        backend: what runs the file; an `.onnx` graph runs in "onnxruntime" (the default) or "openvino", every other
            kind of file has one backend only.
        threads: of a graph on the CPU; by default OMP_NUM_THREADS, or all cores where that is not set.
        float_type: fp32 (the default); in OpenVINO also bf16, in torch on a GPU fp16.
        cache: OpenVINO's, see `OpenVinoPredictor`; by default none.
        check: is called with each file's predictor before it is handed over, and raises if it shall not be;
            `norton_deploy.parity.verification.verify_once` compares an engine or graph with its reference detections.

    Raises:
        UserError: a missing or foreign file, a package, device or provider that is not there, an option of another
            backend, or a threshold that the exported graph cannot honour.
    """
    if score_threshold is not None and not 0.0 <= score_threshold <= 1.0:
        raise UserError(f"score_threshold: expected 0..1, got {score_threshold}")
    files = model_files(path)
    chosen = {name: value for name, value in (("float_type", float_type), ("cache", cache)) if value is not None}
    predictors = [
        _load_one(file, backend, score_threshold, device, providers, categories, threads, chosen) for file in files
    ]
    if check is not None:
        for predictor in predictors:
            check(predictor)
    if len(predictors) == 1:
        return predictors[0]
    return SizeBucketPredictor(predictors)


def model_files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    """The files that `load_predictor` loads for this path.

    Raises:
        UserError: a folder without a graph or engine, or no path at all.
    """
    if isinstance(path, (str, Path)):
        folder = Path(path)
        if not folder.is_dir():
            return [folder]
        found = sorted(folder.glob("*.onnx")) or sorted(folder.glob("*.engine")) or sorted(folder.glob("*.xml"))
        if not found:
            raise UserError(f"{folder}: no .onnx, .engine or .xml file in this folder")
        return found
    files = [Path(entry) for entry in path]
    if not files:
        raise UserError("load_predictor: the list of model files is empty")
    return files


def _load_one(
    file: Path,
    asked: Backend | None,
    score_threshold: float | None,
    device: str | None,
    providers: Sequence[str] | None,
    categories: Path | Categories | None,
    threads: int | None,
    chosen: dict[str, Any],
) -> Predictor:
    """Load one file; a backend is imported only when it is asked for."""
    if not file.is_file():
        raise UserError(f"{file}: no such model file")
    if file.suffix not in BACKENDS_OF_SUFFIX:
        raise UserError(f"{file}: unknown kind of model file; expected {', '.join(BACKENDS_OF_SUFFIX)}")
    possible = BACKENDS_OF_SUFFIX[file.suffix]
    backend = asked or possible[0]
    if backend not in possible:
        raise UserError(f"{file}: backend '{backend}' cannot run a {file.suffix} file; {' or '.join(possible)} can")
    if providers is not None and backend != "onnxruntime":
        raise UserError(f"{file}: providers are ONNX Runtime's; {backend} has none")
    if foreign := chosen.keys() - OWN_OPTIONS.get(backend, set()):
        raise UserError(f"{file}: {' and '.join(sorted(foreign))}: not an option of backend {backend}")
    if threads is not None and backend not in ("onnxruntime", "openvino"):
        raise UserError(f"{file}: threads are for graphs on the CPU; {backend} follows OMP_NUM_THREADS")
    if backend == "torch":
        from norton_deploy.inference.torch_backend import TorchPredictor

        return TorchPredictor.load(file, score_threshold, device, categories, **chosen)
    if categories is not None:
        raise UserError(f"{file}: has its own categories; leave --categories out")
    if backend == "onnxruntime":
        from norton_deploy.inference.onnxruntime_backend import OnnxRuntimePredictor

        return OnnxRuntimePredictor(file, score_threshold, device, providers, threads=threads)
    if backend == "openvino":
        from norton_deploy.inference.openvino_backend import OpenVinoPredictor

        return OpenVinoPredictor(file, score_threshold, device, threads=threads, **chosen)
    if backend == "aotinductor":
        from norton_deploy.inference.package_backend import PackagePredictor

        return PackagePredictor(file, score_threshold, device)
    from norton_deploy.inference.tensorrt_backend import TensorRTPredictor

    return TensorRTPredictor(file, score_threshold, device)


class SizeBucketPredictor(Predictor):
    """Sends each image to the graph whose aspect ratio is nearest, so that little of its input is padding.

    A landscape and a portrait graph (800x1088, 1088x800) serve most photographs. What the letterboxing that
    remains costs in AP is a matter for `eval_det` on this predictor.
    """

    def __init__(self, predictors: Sequence[Predictor]) -> None:
        """Join loaded predictors of one model.

        Raises:
            UserError: they disagree in task or categories, come from different weights, one takes any size
                already, or two have the same aspect ratio.
        """
        first = predictors[0]
        names = ", ".join(predictor.name for predictor in predictors)
        for other in predictors:
            if other.input_size is None:
                raise UserError(f"{other.name}: takes any image size; size buckets are for exported graphs")
            if (other.task, other.categories) != (first.task, first.categories):
                raise UserError(f"{other.name} and {first.name}: another task or other categories; not one model")
            if _weights(other) != _weights(first):
                raise UserError(f"{other.name} and {first.name} were exported from different weights")
        self._buckets = [(_log_aspect(predictor.input_size or (1, 1)), predictor) for predictor in predictors]
        if len({round(aspect, 6) for aspect, _ in self._buckets}) < len(predictors):
            raise UserError(f"{names}: two graphs have the same aspect ratio; keep one of them")
        self.name = names
        self.backend = first.backend
        self.task = first.task
        self.categories = first.categories
        self.input_size = None
        self.device = first.device

    def bucket_of(self, image_size: tuple[int, int]) -> Predictor:
        """The predictor whose aspect ratio is nearest (in the logarithm) to (height, width)."""
        aspect = _log_aspect(image_size)
        return min(self._buckets, key=lambda bucket: abs(bucket[0] - aspect))[1]

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        members: dict[int, list[int]] = {}
        chosen = [self.bucket_of((image.shape[0], image.shape[1])) for image in images]
        for position, predictor in enumerate(chosen):
            members.setdefault(id(predictor), []).append(position)
        found: dict[int, Detections] = {}
        timing = StageTiming()
        for positions in members.values():
            predictor = chosen[positions[0]]
            found.update(zip(positions, predictor([images[position] for position in positions]), strict=True))
            timing += predictor.timing
        self.timing = timing
        return [found[position] for position in range(len(images))]


def _log_aspect(image_size: tuple[int, int]) -> float:
    return math.log(image_size[0] / image_size[1])


def _weights(predictor: Predictor) -> str:
    contract = getattr(predictor, "contract", None)
    return contract.weights_sha256 if contract is not None else ""


def packaged_path(task: PackagedTask) -> Path:
    """Where the package's own small trained detector of a task lies, whether it is there or not.

    Compressed for speed, trained on the embedded data, in float16: it knows the categories of the drawn scenes only and
    is there to show something without any training. benchmarks/package_weights.py puts it there.
    """
    return PACKAGED_FOLDER / f"fast_{task}.safetensors"


def packaged_detector(task: PackagedTask) -> Path:
    """The checkpoint of the packaged detector of a task.

    Raises:
        UserError: this installation has none.
    """
    path = packaged_path(task)
    if not path.is_file():
        raise UserError(
            f"{path.name}: this installation has no packaged {task} detector; give --model FILE, "
            "for example one that `make demo` trains"
        )
    return path
