"""TensorRT and TensorRT-RTX engines from an exported graph, and the manifest that stands beside each of them.

Networks are strongly typed: every operator runs in the precision that the graph gives it, there is no builder
flag to choose one. TensorRT-RTX compiles ahead of time on any machine, without a GPU; TensorRT times kernels and
therefore needs the GPU that will run the engine.
"""

from __future__ import annotations

import importlib
import json
import shlex
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from norton_deploy.config import from_mapping
from norton_deploy.errors import UserError
from norton_deploy.export.contract import GraphContract, Precision
from norton_deploy.export.onnx_export import read_contract
from norton_deploy.files import atomic_write, read_json, sha256_of

Engine = Literal["tensorrt", "tensorrt-rtx"]
Compiler = Literal["tensorrt", "tensorrt-rtx", "aotinductor"]
"""An engine, or torch itself (`norton_deploy.export.torch_package`)."""
MODULE_OF_ENGINE: dict[Engine, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
MANIFEST_FORMAT = 2
PORTABLE = "portable"
CPU_ENGINE = "cpu"
NOT_RUN = "built, not run"


class EngineUnavailableError(Exception):
    """The engine cannot be built on this machine; the message says in one line what is missing."""


@dataclass(frozen=True)
class EngineManifest:
    """What stands beside an engine, as JSON.

    Attributes:
        engine: which engine it is for, or "aotinductor".
        engine_version: version of the engine that built it; no other can load it.
        compute_capability: of the GPU that it was built for, as "86", or "portable", or "cpu".
        checked: what is known of the engine itself, in words.
    """

    engine: Compiler
    engine_version: str
    compute_capability: str | None
    norton_deploy_version: str
    graph_sha256: str
    engine_sha256: str
    contract: GraphContract
    checked: str = NOT_RUN

    @property
    def ran(self) -> bool:
        """Whether the engine has run and was compared."""
        return not self.checked.startswith(NOT_RUN)

    def write(self, engine_path: str | Path) -> None:
        """Write it beside its engine, whole or not at all."""
        with atomic_write(manifest_path(engine_path), "w") as stream:
            stream.write(json.dumps(self.to_json(), indent=2) + "\n")

    def to_json(self) -> dict[str, Any]:
        """As JSON values; `load` reads them."""
        return {"format": MANIFEST_FORMAT} | vars(self) | {"contract": self.contract.to_json()}

    @classmethod
    def load(cls, engine_path: str | Path) -> EngineManifest:
        """Read an engine's manifest and check the engine against it; call it before deserialising anything.

        Raises:
            UserError: engine or manifest is missing or broken, or the engine is not the one that was built.
        """
        path = manifest_path(engine_path)
        if not Path(engine_path).is_file():
            raise UserError(f"{engine_path}: no such engine")
        if not path.is_file():
            raise UserError(f"{path}: no manifest beside the engine; build it with export_trt")
        fields = read_json(path, "an engine's manifest")
        if not isinstance(fields, dict) or fields.pop("format", None) != MANIFEST_FORMAT:
            raise UserError(f"{path}: not an engine manifest, or of another version; build the engine again")
        contract = GraphContract.from_json(fields.pop("contract", None), str(path))
        manifest = from_mapping(cls, fields | {"contract": contract}, str(path))
        if (manifest.engine == "aotinductor") != (Path(engine_path).suffix == ".pt2"):
            raise UserError(f"{engine_path}: made by {manifest.engine}, whose files are not called so; rename it back")
        if sha256_of(engine_path) != manifest.engine_sha256:
            raise UserError(
                f"{engine_path}: its SHA-256 is not the manifest's; it was changed or replaced, build it again"
            )
        return manifest


@dataclass(frozen=True)
class EngineBuild:
    """An engine that was built, or what to do on the machine that can build it.

    Attributes:
        graph, file: the ONNX file and the engine.
        manifest: None where it was not built.
        reason: why it was not built, "" where it was.
    """

    graph: Path
    file: Path
    engine: Compiler
    manifest: EngineManifest | None
    reason: str = ""
    build_s: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        if self.manifest is None:
            commands = target_commands(self.graph, self.file, self.engine)
            return {"engine": None, "reason": self.reason, "target_commands": commands}
        return {"engine": str(self.file), "manifest": self.manifest.to_json(), "build_s": self.build_s}

    def text(self) -> str:
        """For people."""
        if self.manifest is None:
            own, nvidia = target_commands(self.graph, self.file, self.engine)
            return (
                f"{self.file}: not built, {self.reason}\n{self.graph} is ready; on the target run the first "
                f"(the second only to time the engine):\n  {own}\n  {nvidia}"
            )
        built_for = self.manifest.compute_capability
        return (
            f"{self.file}: {self.engine} {self.manifest.engine_version} for "
            f"{'the CPU' if built_for == CPU_ENGINE else f'compute capability {built_for}'}, "
            f"built in {self.build_s:.0f} s; {self.manifest.checked}"
        )


def build_or_explain(
    onnx_path: Path, engine_path: Path, *, engine: Engine = "tensorrt-rtx", compute_capability: str | None = None
) -> EngineBuild:
    """`build_engine` where this machine can, otherwise how it is done on one that can.

    Raises:
        UserError: as `build_engine`.
    """
    started = time.perf_counter()
    try:
        manifest = build_engine(onnx_path, engine_path, engine=engine, compute_capability=compute_capability)
    except EngineUnavailableError as error:
        return EngineBuild(onnx_path, engine_path, engine, None, str(error))
    return EngineBuild(onnx_path, engine_path, engine, manifest, build_s=time.perf_counter() - started)


def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    engine: Engine = "tensorrt-rtx",
    compute_capability: str | None = None,
) -> EngineManifest:
    """Build an engine and write it, and its manifest, whole or not at all.

    Args:
        onnx_path: a graph of `export_onnx` with the "tensorrt" target.
        engine_path: the .engine file; the manifest is `manifest_path(engine_path)`.
        engine: "tensorrt" or "tensorrt-rtx".
        compute_capability: "86" for 8.6, and so on. None: TensorRT-RTX makes a portable engine (8.0, 8.6, 8.9,
            12.0 and later), TensorRT takes the GPU of this machine.

    Raises:
        EngineUnavailableError: the engine's package or GPU is not there.
        UserError: the graph has the wrong target, cannot be parsed or built, or the capability is unknown.
    """
    contract = read_contract(onnx_path)
    if contract.target != "tensorrt":
        raise UserError(f"{onnx_path}: built for target '{contract.target}'; export it with target tensorrt")
    package = engine_package(engine)
    if engine == "tensorrt":
        require_gpu(compute_capability)
    log = _logger(package)
    capability = compute_capability if engine == "tensorrt-rtx" else None
    timings = Path(f"{engine_path}.timings") if engine == "tensorrt" else None
    plan = _build(package, log, Path(onnx_path), capability, contract.precision, timings)
    with atomic_write(engine_path) as stream:
        stream.write(plan)
    manifest = EngineManifest(
        engine=engine,
        engine_version=str(package.__version__),
        compute_capability=compute_capability or (PORTABLE if engine == "tensorrt-rtx" else local_capability()),
        norton_deploy_version=version("norton-deploy"),
        graph_sha256=sha256_of(onnx_path),
        engine_sha256=sha256_of(engine_path),
        contract=contract,
    )
    manifest.write(engine_path)
    return manifest


def manifest_path(engine_path: str | Path) -> Path:
    """The manifest of `model.engine` is `model.engine.json`."""
    return Path(f"{engine_path}.json")


def engine_package(engine: Engine) -> ModuleType:
    """The Python package of an engine.

    Raises:
        EngineUnavailableError: it is not installed.
    """
    name = MODULE_OF_ENGINE[engine]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        extra = "rtx" if engine == "tensorrt-rtx" else "tensorrt"
        message = f"{engine}: the package '{name}' is not installed (pip install 'norton-deploy[{extra}]')"
        raise EngineUnavailableError(message) from error


def local_capability() -> str | None:
    """Compute capability of this machine's first GPU, as "86"; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"{major}{minor}"


def require_gpu(compute_capability: str | None) -> None:
    """TensorRT builds for the GPU at hand only."""
    found = local_capability()
    if found is None:
        raise EngineUnavailableError("tensorrt: no GPU here, and TensorRT builds only on the GPU that runs the engine")
    if compute_capability not in (None, found):
        raise EngineUnavailableError(f"tensorrt: this GPU is of compute capability {found}, not {compute_capability}")


def target_commands(onnx_path: str | Path, engine_path: str | Path, engine: Compiler) -> list[str]:
    """The commands that finish on the target: this package's, and NVIDIA's own tool."""
    graph, out = str(onnx_path), str(engine_path)
    own = ["norton", "export_trt", "--onnx", graph, "--engine", engine, "--out", out]
    tool = ["tensorrt_rtx", f"--onnx={graph}"]
    if engine == "tensorrt":
        tool = ["trtexec", f"--onnx={graph}", "--stronglyTyped"]
    return [shlex.join(own), shlex.join([*tool, f"--saveEngine={out}"])]


def _logger(package: ModuleType) -> Any:
    """A logger that keeps the errors instead of printing them."""

    class KeptErrors(package.ILogger):  # type: ignore[name-defined, misc]  # of an engine that may be absent
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (package.ILogger.ERROR, package.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return KeptErrors()


def _build(
    package: ModuleType,
    log: Any,
    onnx_path: Path,
    compute_capability: str | None,
    precision: Precision,
    timings: Path | None,
) -> bytes:
    """Parse and compile; the serialized engine. TensorRT's times of kernels are kept in `timings`."""
    builder = package.Builder(log)
    strongly_typed = 1 << int(package.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(strongly_typed)
    parser = package.OnnxParser(network, log)
    if not parser.parse_from_file(str(onnx_path)):
        problem = parser.get_error(0).desc() if parser.num_errors else "; ".join(log.errors[:1])
        raise UserError(f"{onnx_path}: {package.__name__} cannot parse it: {' '.join(problem.split())}")
    config = builder_config(package, builder, precision, timings)
    if compute_capability is not None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(_capability(package, compute_capability), 0)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        problem = " ".join((log.errors or ["no reason given"])[0].split())
        raise UserError(f"{onnx_path}: {package.__name__} cannot build it: {problem}")
    if timings is not None:
        with atomic_write(timings) as stream:
            stream.write(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def builder_config(package: ModuleType, builder: Any, precision: Precision, timings: Path | None = None) -> Any:
    """How to build: fp32 means fp32, though a builder would round the factors of its products to TF32's 10 bits.

    Args:
        precision: tf32 leaves products as they are by default.
        timings: TensorRT's times of kernels from an earlier build, if there are any.
    """
    config = builder.create_builder_config()
    if timings is not None:
        known = timings.read_bytes() if timings.is_file() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    if precision != "tf32":
        config.clear_flag(package.BuilderFlag.TF32)
    return config


def _capability(package: ModuleType, compute_capability: str) -> Any:
    known = {name[2:]: value for name, value in vars(package.ComputeCapability).items() if name.startswith("SM")}
    if compute_capability not in known:
        raise UserError(
            f"compute capability '{compute_capability}': {package.__name__} {package.__version__} knows "
            f"{', '.join(sorted(known, key=int))}"
        )
    return known[compute_capability]
