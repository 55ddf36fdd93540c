"""AOTInductor packages (.pt2) of `norton export_torch`. On a GPU they have not been run by this project's tests."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from norton_deploy.errors import UserError
from norton_deploy.export.tensorrt_build import CPU_ENGINE, EngineManifest
from norton_deploy.inference.cuda_graph import FixedCall
from norton_deploy.inference.static_graph import Outputs, Start, StaticGraphPredictor
from norton_deploy.inference.torch_backend import choose_device, device_name, full_precision


class PackagePredictor(StaticGraphPredictor):
    """A detector that torch compiled ahead of time; on a GPU as a CUDA graph where it can be recorded."""

    backend = "aotinductor"

    def __init__(self, path: Path, score_threshold: float | None = None, device: str | None = None) -> None:
        """Check the manifest, then load the package.

        Args:
            path: the `.pt2` file, with its manifest beside it.
            device: must be of the kind that the package was compiled for.

        Raises:
            UserError: manifest, torch version or device do not fit.
        """
        manifest = EngineManifest.load(path)
        super().__init__(str(path), manifest.contract, score_threshold)
        built_for = manifest.compute_capability
        place = choose_device(device or ("cpu" if built_for == CPU_ENGINE else "cuda"))
        found = CPU_ENGINE if place.type == "cpu" else "{}{}".format(*torch.cuda.get_device_capability(place))
        for what, built, here in (
            ("torch", manifest.engine_version, torch.__version__),
            ("compute capability", built_for, found),
        ):
            if built != here:
                raise UserError(f"{path}: compiled for {what} {built}, here it is {here}; run norton export_torch here")
        try:
            package = torch._inductor.aoti_load_package(str(path), device_index=place.index or -1)
        except RuntimeError as error:
            raise UserError(f"{path}: torch cannot load it: {str(error).splitlines()[0]}") from error
        dtype = getattr(torch, self.contract.input_dtype)
        self._exact = full_precision if self.contract.precision != "tf32" else nullcontext
        launch = "" if place.type == "cpu" else ", CUDA graph"
        with torch.no_grad(), self._exact():
            try:
                self._call = FixedCall(package, self.contract.input_shape, place, dtype=dtype)
            except RuntimeError as error:
                launch = f", no CUDA graph ({str(error).splitlines()[0]})"
                self._call = FixedCall(package, self.contract.input_shape, place, dtype=dtype, record=False)
        self.device = f"torch {torch.__version__}, AOTInductor, {device_name(place)}{launch}"

    def run(self, batch: npt.NDArray[np.generic]) -> Outputs:
        started = time.perf_counter()
        with torch.no_grad(), self._exact():
            outputs = self._call(batch)
        self.timing.add("infer_ms", started)
        return outputs

    @contextmanager
    def _starting(self) -> Iterator[Start]:
        with self._call.in_flight() as flight:

            def start(batch: npt.NDArray[np.generic]) -> Callable[[], Outputs]:
                with self._turn, torch.no_grad(), self._exact():
                    return partial(self._timed, flight.submit(batch))

            yield start
