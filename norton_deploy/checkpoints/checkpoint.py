"""One file per model: safetensors with a JSON header that says how to rebuild it and where it comes from."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from norton_deploy.compression.compress import apply_structure
from norton_deploy.config import from_mapping
from norton_deploy.errors import UserError, shown
from norton_deploy.files import atomic_write, check_tree, parse_json, sha256_of
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.models.detectors import DetectorSettings, ModelSettings
from norton_deploy.structures import METADATA_KEY, TASKS, Categories, ModelTask

FORMAT_VERSION = 2
LARGEST_USUAL = 2048
"""A model with larger numbers in its settings is compared with its file before memory is taken for it."""


@dataclass(frozen=True)
class CheckpointHeader:
    """What a checkpoint says about its weights.

    Attributes:
        task: cls, box, mask or keypoint.
        settings: what the dense model was built from.
        plan: the plan it was compressed by, None when it is dense.
        categories: the detector's labels; a classifier's classes are labels 1..K here, in order.
        lineage: one entry per command that made it, oldest first: command, source file and its SHA-256,
            date (UTC) and version.
        pyramid_channels: of a detector whose pyramid the plan narrowed, the dense pyramid's channels that are
            left, ascending; None when all are, or nobody knows.
    """

    task: ModelTask
    settings: ModelSettings
    plan: CompressionPlan | None
    categories: Categories
    lineage: tuple[dict[str, str], ...] = ()
    pyramid_channels: tuple[int, ...] | None = None

    @property
    def detector(self) -> DetectorSettings:
        """A detector's settings; a `UserError` where it is a classifier."""
        if not isinstance(self.settings, DetectorSettings):
            raise UserError(f"expected a detector, found the classifier {self.settings.architecture}")
        return self.settings

    @property
    def classifier(self) -> ClassifierSettings:
        """A classifier's settings; a `UserError` where it is a detector."""
        if not isinstance(self.settings, ClassifierSettings):
            raise UserError(f"expected a classifier, found a {self.task} detector")
        return self.settings

    def made_by(self, command: str, source: str | Path | None = None, **changes: Any) -> "CheckpointHeader":
        """This header with `changes` to its fields, and with one more lineage entry, made now by this version."""
        date = datetime.now(UTC).isoformat(timespec="seconds")
        entry = {"command": command, "date": date, "version": version("norton-deploy")}
        if source is not None:
            entry |= {"source": str(source), "source_sha256": sha256_of(source)}
        return replace(self, **changes, lineage=(*self.lineage, entry))

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        values: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "task": self.task,
            "settings": asdict(self.settings),
            "plan": None if self.plan is None else self.plan.to_dict(),
            "categories": self.categories.to_list(),
            "lineage": list(self.lineage),
        }
        if self.pyramid_channels is not None:
            values["pyramid_channels"] = list(self.pyramid_channels)
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> "CheckpointHeader":
        """Inverse of `to_dict`.

        Raises:
            UserError: another format or a broken field, named with `source`.
        """
        if not isinstance(values, dict):
            raise UserError(f"{source}: the header is {shown(values)}; it is no checkpoint of norton_deploy")
        check_tree(values, f"{source}: header")
        if values.get("format") != FORMAT_VERSION:
            raise UserError(
                f"{source}: checkpoint format {shown(values.get('format'))}, this version reads {FORMAT_VERSION}; "
                "use the norton_deploy version that wrote it"
            )
        task = values.get("task")
        if task not in ("cls", *TASKS):
            raise UserError(f"{source}: header: unknown task {shown(task)}")
        try:
            settings_class: Any = ClassifierSettings if task == "cls" else DetectorSettings
            plan, channels, settings = values["plan"], values.get("pyramid_channels"), values["settings"]
            return cls(
                task,
                from_mapping(settings_class, settings, f"{source}: header: settings"),
                None if plan is None else CompressionPlan.from_dict(plan, f"{source}: header: plan"),
                Categories.from_list(values["categories"]),
                tuple(_checked(values["lineage"], dict, f"{source}: header: lineage")),
                None if channels is None else tuple(_checked(channels, int, f"{source}: header: pyramid_channels")),
            )
        except KeyError as error:
            raise UserError(f"{source}: header: the field {error} is missing") from error
        except UserError as error:
            raise error if source in str(error) else UserError(f"{source}: header: {error}") from error


def _checked(values: Any, kind: type, source: str) -> list[Any]:
    """The values, if they are a list of this kind."""
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise UserError(f"{source}: expected a list of {kind.__name__}, got {shown(values)}")
    return values


@dataclass(frozen=True)
class Checkpoint:
    """A loaded model (evaluation mode, float32, CPU) and its header."""

    model: nn.Module
    header: CheckpointHeader


def class_categories(names: Sequence[str]) -> Categories:
    """A classifier's class names as categories: class index k has label and id k + 1."""
    numbers = tuple(range(1, len(names) + 1))
    return Categories(numbers, numbers, tuple(names))


def tensors_digest(tensors: Mapping[str, Tensor], prefix: bytes = b"") -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, by names ascending; 64 hexadecimal digits.

    Args:
        tensors: on any device, for example a model's `state_dict()`.
    """
    digest = hashlib.sha256(prefix)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: str | Path, model: nn.Module, header: CheckpointHeader, *, half: bool = False) -> None:
    """Write weights and header, whole or not at all.

    Args:
        half: store floating-point tensors as float16 (they load as float32 again).
    """
    tensors = {
        name: (tensor.half() if half and tensor.is_floating_point() else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    content = header.to_dict()
    content["digest"] = tensors_digest(tensors, _header_bytes(content))
    with atomic_write(path) as stream:
        stream.write(safetensors.torch.save(tensors, {METADATA_KEY: json.dumps(content)}))


def read_header(path: str | Path) -> CheckpointHeader:
    """Read only the header of a checkpoint.

    Raises:
        UserError: the file is missing, truncated, or not a checkpoint of norton_deploy.
    """
    return CheckpointHeader.from_dict(_open(path)[0], str(path))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Rebuild the model that a checkpoint holds; nothing but the file is needed.

    Returns:
        The model in evaluation mode on the CPU with float32 weights, and the header.

    Raises:
        UserError: the file is missing, truncated, foreign, or was changed since it was written.
    """
    content, tensors = _open(path)
    recorded = content.pop("digest", None)
    if recorded != tensors_digest(tensors, _header_bytes(content)):
        raise UserError(f"{path}: the contents do not match their recorded digest; get the file again")
    header = CheckpointHeader.from_dict(content, str(path))
    floats = {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}
    return Checkpoint(rebuild(header, floats, str(path)).eval(), header)


def rebuild(header: CheckpointHeader, tensors: dict[str, Tensor], source: str) -> nn.Module:
    """The model of a header with these weights.

    Raises:
        UserError: the weights are of another model; found out before memory is taken for settings that ask for much.
    """
    numbers = _leaves([asdict(header.settings), header.plan and header.plan.to_dict()])
    if any(type(value) is int and value > LARGEST_USUAL for value in numbers):
        with torch.device("meta"):
            check_shapes(build_structure(header), tensors, source)
    model = build_structure(header)
    load_weights(model, tensors, source)
    return model


def build_structure(header: CheckpointHeader) -> nn.Module:
    """The model of a header with meaningless weights; the global random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        model = header.settings.build(header.task)
        return model if header.plan is None else apply_structure(model, header.plan)


def load_weights(model: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Load a complete set of weights, strictly.

    Raises:
        UserError: see `check_shapes`; or a number is not finite, and the tensor is named.
    """
    check_shapes(model, tensors, source)
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise UserError(f"{source}: tensor '{name}' holds NaN or infinity; take the weights from before that")
    own = model.state_dict()
    known = {name: tensor for name, tensor in tensors.items() if name in own}
    model.load_state_dict(known, strict=False)


def check_shapes(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Compare the names and shapes of a complete set of weights with a model's.

    Raises:
        UserError: names or shapes differ; the message names the first that does not fit.
    """
    own = model.state_dict()
    # FrozenBatchNorm2d has no such counter and BatchNorm does not use it in evaluation.
    optional = "num_batches_tracked"
    for name in sorted(own.keys() | tensors.keys()):
        if name.endswith(optional) and (name not in own or name not in tensors):
            continue
        if name not in tensors:
            raise UserError(f"{source}: the tensor '{name}' is missing; it is of another model")
        if name not in own:
            raise UserError(f"{source}: unexpected tensor '{name}'; it is of another model")
        if own[name].shape != tensors[name].shape:
            expected, found = tuple(own[name].shape), tuple(tensors[name].shape)
            raise UserError(f"{source}: tensor '{name}' has shape {found}, expected {expected}")


def _leaves(values: Any) -> Iterator[Any]:
    """What nested mappings, lists and tuples hold."""
    if isinstance(values, dict | list | tuple):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _leaves(value)
    else:
        yield values


def _open(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The raw header and the tensors of a checkpoint."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if METADATA_KEY not in metadata:
                raise UserError(f"{path}: a safetensors file, but not a checkpoint of norton_deploy")
            content = parse_json(metadata[METADATA_KEY], f"{path}: header")
            if not isinstance(content, dict):
                raise UserError(f"{path}: the header is {shown(content)}; it is no checkpoint of norton_deploy")
            return content, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    except UserError:
        raise
    except Exception as error:  # SafetensorError, and what torch says of types that it does not know
        raise UserError(f"{path}: truncated or not a safetensors file ({' '.join(str(error).split())})") from error


def _header_bytes(content: dict[str, Any]) -> bytes:
    """What a checkpoint's digest covers of its header (which must not hold the digest itself)."""
    return json.dumps(content, sort_keys=True).encode()
