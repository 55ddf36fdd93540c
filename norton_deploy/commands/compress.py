"""Compress a classifier, or the backbone or the whole of a detector, by a plan."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from torch import Tensor
from tqdm import tqdm

from norton_deploy.checkpoints.checkpoint import save_checkpoint
from norton_deploy.checkpoints.compress_checkpoint import compress_checkpoint
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import Output, command_line, write_json
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.data.image_folder import read_images
from norton_deploy.files import check_output_file, refuse_same_file
from norton_deploy.method.filter_selection import AngleMeasure
from norton_deploy.method.plan import Choice, CompressionPlan
from norton_deploy.progress import progress_bar

FIRST = ("model", "weights", "categories", "image-size", "refit", "refit-images", "overwrite", "json")


@dataclass(frozen=True)
class Settings(Output):
    """Settings of tools/compress.py."""

    plan: Path
    """Plan (YAML): rank and kept filters of each layer; see configs/plans/."""
    out: Path
    """Checkpoint to write (.safetensors)."""
    model: str = "resnet50"
    """resnet18, resnet34, resnet50, resnet101, vgg16_bn, a .safetensors checkpoint or torchvision's .pth."""
    weights: str = "none"
    """For an architecture's name: none (random weights), imagenet (torchvision's) or a weights file."""
    categories: Path | None = None
    """Categories of a .pth file: a COCO annotation file or a list of names, one a line."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels of the images that the detector is for; by default its own (of a .pth 800, 1333)."""
    choose: Choice | None = None
    """Which filters survive: by the angles between their factors, as in the paper, or by what the next layers lose on
    the images of --refit (harm); by default what the plan says."""
    measure: AngleMeasure = "largest"
    """How the principal angles of two factors become one distance."""
    starts: int = 4
    """Starts of every decomposition; the best is kept for each filter."""
    seed: int = 0
    """Seed of the random starts."""
    refit: Path | None = None
    """Folder of unlabelled images on which every layer is refitted by least squares to the dense one's outputs."""
    refit_images: int = 64
    """How many of those images to use, at most; they stay in memory."""
    refit_side: int | None = None
    """Short side of those images in pixels, at most, for a detector: smaller is faster; by default the model's own."""
    reestimate: Path | None = None
    """Folder of images with which the BatchNorm statistics are estimated anew; without it they stay."""
    reestimate_images: int = 256
    """How many of those images to use, at most."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="compress", description=__doc__ or "")
    refuse_same_file(settings.out, Path(settings.model), Path(settings.weights), settings.plan)
    check_output_file(settings.out, "--out", ".safetensors", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    plan = CompressionPlan.load(settings.plan)
    dense = open_model(settings.model, settings.weights, categories=settings.categories, image_size=settings.image_size)
    source = next((name for name in (settings.weights, settings.model) if Path(name).is_file()), None)
    if settings.weights == "none" and source is None:
        print(f"note: the weights of {settings.model} are random (--weights none)", file=sys.stderr)
    with LayerBars() as bars:
        small = compress_checkpoint(
            dense,
            plan,
            command=command_line("compress", argv),
            source=source,
            seed=settings.seed,
            starts=settings.starts,
            measure=settings.measure,
            choose=settings.choose,
            refit_images=_images(settings.refit, settings.refit_images),
            refit_side=settings.refit_side,
            reestimate_images=_images(settings.reestimate, settings.reestimate_images),
            progress=bars.advance,
        )
    save_checkpoint(settings.out, small.model, small.header)
    before, after = (complexity_of(found.model, found.header.settings) for found in (dense, small))
    print(
        f"{settings.out}: {after.macs / 1e9:.2f} GMACs ({after.macs / before.macs - 1:+.0%}), "
        f"{after.params / 1e6:.2f} M parameters ({after.params / before.params - 1:+.0%}) "
        f"at {after.image_size[0]} x {after.image_size[1]}",
        file=sys.stderr,
    )
    figures = {
        "image_size": after.image_size,
        "proposals": after.proposals,
        "macs": after.macs,
        "params": after.params,
        "dense_macs": before.macs,
        "dense_params": before.params,
        "checkpoint": str(settings.out),
    }
    write_json(figures, settings.json)
    return 0


def _images(folder: Path | None, limit: int) -> Iterator[Tensor] | None:
    return None if folder is None else read_images(folder, limit)


class LayerBars(ExitStack):
    """A progress bar for each stage of the compression, closed together; 0 layers: nobody knows how many."""

    def __init__(self) -> None:
        super().__init__()
        self.bars: dict[str, tqdm[NoReturn]] = {}

    def advance(self, stage: str, layer: str, layers: int) -> None:
        """One layer of a stage, or one batch of images, is done."""
        if stage not in self.bars:
            self.bars[stage] = self.enter_context(progress_bar(total=layers or None, desc=stage, unit="step"))
        self.bars[stage].set_postfix_str(layer)
        self.bars[stage].update()
