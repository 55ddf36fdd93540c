"""The int8 step of an export: calibration images, layers left in float, and advice where too much is lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from norton_deploy.data.image_file import read_image
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError, require_least
from norton_deploy.export.contract import GraphContract
from norton_deploy.export.equalise import equalised
from norton_deploy.export.letterbox import letterboxed
from norton_deploy.export.quantise import Cpu, Ranges, calibrate, cpu_of_this_machine, write_quantised
from norton_deploy.export.quantise_sensitivity import HeadErrors
from norton_deploy.inference.predictor import Image
from norton_deploy.inference.static_graph import to_graph_input

if TYPE_CHECKING:
    from norton_deploy.parity.export_checked import ExportOptions

SYNTHETIC = "synthetic"
FIRST_SCENE = 10_000
"""Seed of the first drawn scene: none that an export is compared on."""
MEASURED = 2
"""Batches that a layer's error is measured on."""
EQUALISED = 32
"""Batches that the ranges of single channels are taken from."""
NAMED = 3
"""Layers that advice names."""


def calibration_images(options: ExportOptions, image_size: tuple[int, int]) -> list[Image]:
    """What ranges are taken from: uint8 RGB [H, W, 3].

    Raises:
        UserError: nothing was named, or the folder has no images.
    """
    if options.calibration is None:
        raise UserError(
            "--precision int8: needs --calibration FOLDER, 200 to 500 images like those that will be seen "
            f"('{SYNTHETIC}' takes drawn scenes)"
        )
    require_least(1, calibration_images=options.calibration_images)
    if options.calibration == SYNTHETIC:
        size = options.input_size or image_size
        return [draw_scene(FIRST_SCENE + index, size).image for index in range(options.calibration_images)]
    files = find_images(Path(options.calibration))
    step = max(len(files) // options.calibration_images, 1)  # from all of the folder: neighbours are often alike
    return [read_image(file) for file in files[::step][: options.calibration_images]]


@dataclass(frozen=True)
class Quantisation:
    """An fp32 graph, its ranges, and what of it shall stay in float."""

    model: Any
    ranges: Ranges
    batches: Sequence[npt.NDArray[Any]]
    contract: GraphContract
    cpu: Cpu
    float_layers: tuple[str, ...]

    @classmethod
    def of(
        cls,
        graph: Path,
        contract: GraphContract,
        images: Sequence[Image],
        options: ExportOptions,
        report: Callable[[str], None],
    ) -> Quantisation:
        """Calibrate a graph, and find the layers to leave out where `head_error` asks for it.

        Raises:
            UserError: see `HeadErrors.left_out`.
        """
        import onnx

        model, size = onnx.load_model(graph), contract.batch
        batches = [
            to_graph_input(letterboxed(images[start : start + size], contract.input_size), contract.input_dtype)
            for start in range(0, len(images) - size + 1, size)
        ]
        if not batches:
            raise UserError(f"--calibration: {len(images)} images are too few for a batch of {size}")
        model = equalised(model, batches[:EQUALISED])
        cpu = options.cpu or cpu_of_this_machine()
        found = cls(model, calibrate(model, batches), batches, contract, cpu, options.float_layers)
        if contract.target != "tensorrt":
            report(f"int8: weights for a CPU with {cpu}" + (", 7 bits" if cpu == "avx2" else ""))
        if options.head_error is None:
            return found
        left = found.errors().left_out(options.head_error)
        report(f"int8: left in float for an error of {options.head_error:g}: {', '.join(left) or 'no layer'}")
        layers = tuple(sorted({*left, *options.float_layers}))
        return cls(model, found.ranges, batches, contract, cpu, layers)

    def errors(self) -> HeadErrors:
        """What each layer costs."""
        symmetric = self.contract.target == "tensorrt"
        return HeadErrors(self.model, self.ranges, self.batches[:MEASURED], symmetric=symmetric)

    def write(self, path: Path) -> GraphContract:
        """Write the graph in 8 bits; returns its contract."""
        return write_quantised(
            self.model, self.contract, path, self.ranges, cpu=self.cpu, float_layers=self.float_layers
        )

    def advice(self, problem: str) -> UserError:
        """The problem, and the layers that cause most of it."""
        worst = [name for name in self.errors().each() if name not in self.float_layers][:NAMED]
        return UserError(f"{problem}; leave the worst layers in float: --float-layers {' '.join(worst)}")
