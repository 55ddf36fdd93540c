"""Compress a classifier, or the backbone or the whole of a detector, by a plan."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

from torch import Tensor
from tqdm import tqdm

from norton_deploy.checkpoints.checkpoint import save_checkpoint
from norton_deploy.checkpoints.open_model import open_model
from norton_deploy.commands import command_line, write_json
from norton_deploy.compression.compress import compress, fit_plan
from norton_deploy.compression.probe import make_probes
from norton_deploy.compression.reestimate import reestimate_batch_norm
from norton_deploy.compression.refit import refit
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.data.image_folder import read_images
from norton_deploy.errors import UserError
from norton_deploy.files import check_output_file, refuse_same_file
from norton_deploy.method.filter_choices import choose_by_angles
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.method.subspace_angles import Measure

WHOLE_DETECTOR = "rcnn"
"""Architecture of plans that name a detector's pyramid and heads too."""


@dataclass(frozen=True)
class Settings:
    """Settings of tools/compress.py."""

    plan: Path
    """Plan (YAML): rank and kept filters of each layer; see configs/plans/."""
    out: Path
    """Checkpoint to write (.safetensors)."""
    model: str = "resnet50"
    """resnet18, resnet34, resnet50, resnet101, vgg16_bn, a .safetensors checkpoint or torchvision's .pth."""
    weights: str = "none"
    """For an architecture's name: none (random weights), imagenet (torchvision's) or a weights file."""
    measure: Measure = "largest"
    """How the principal angles of two factors become one distance."""
    starts: int = 4
    """Starts of every decomposition; the best is kept for each filter."""
    seed: int = 0
    """Seed of the random starts."""
    refit: Path | None = None
    """Folder of unlabelled images on which every layer is refitted by least squares to the dense one's outputs."""
    refit_images: int = 64
    """How many of those images to use, at most; they stay in memory."""
    reestimate: Path | None = None
    """Folder of images with which the BatchNorm statistics are estimated anew; without it they stay."""
    reestimate_images: int = 256
    """How many of those images to use, at most."""
    json: Path | None = None
    """Write the figures as JSON to a file, or to stdout with '-'."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="compress", description=__doc__ or "")
    check_output_file(settings.out, "--out", ".safetensors")
    check_output_file(settings.json, "--json")
    refuse_same_file(settings.out, Path(settings.model), Path(settings.weights), settings.plan)
    plan = CompressionPlan.load(settings.plan)
    dense = open_model(settings.model, settings.weights)
    if dense.header.plan is not None:
        raise UserError(f"{settings.model}: is compressed already; start from its dense original")
    if settings.weights == "none" and not Path(settings.model).is_file():
        print(f"note: the weights of {settings.model} are random (--weights none)", file=sys.stderr)
    found = dense.header.settings
    own = found.architecture
    if plan.architecture not in (own, WHOLE_DETECTOR):
        raise UserError(f"{settings.plan}: a plan for {plan.architecture}, and {settings.model} is a {own}")
    fitted = fit_plan(dense.model, plan)
    kept: dict[str, Tensor] = {}
    steps = len(fitted.ranks) + len(fitted.keep)
    with tqdm(total=steps, desc="compress", unit="layer", disable=None) as bar:
        small = compress(
            dense.model,
            plan,
            seed=settings.seed,
            starts=settings.starts,
            choose=partial(choose_by_angles, measure=settings.measure),
            progress=lambda name: _advance(bar, name),
            kept=kept,
        )
    if settings.refit is not None:
        images = read_images(settings.refit, settings.refit_images)
        probes = list(make_probes(dense.model, images, dense.header.settings))
        with tqdm(desc="refit", unit="layer", disable=None) as bar:
            refit(
                small,
                dense.model,
                kept,
                probes,
                seed=settings.seed,
                progress=lambda name: _advance(bar, name),
            )
    if settings.reestimate is not None:
        images = read_images(settings.reestimate, settings.reestimate_images)
        reestimate_batch_norm(small, images, dense.header.settings)
    source = next((name for name in (settings.weights, settings.model) if Path(name).is_file()), None)
    pyramid = kept.get("backbone.fpn.layer_blocks")
    header = dense.header.made_by(
        command_line("compress", argv),
        source,
        plan=plan,
        pyramid_channels=None if pyramid is None else tuple(pyramid.tolist()),
    )
    save_checkpoint(settings.out, small, header)
    size, proposals = found.input_size, found.proposals
    before, after = (count_complexity(model, size, proposals=proposals) for model in (dense.model, small))
    figures = {
        "image_size": size,
        "proposals": proposals,
        "macs": after.macs,
        "params": after.params,
        "dense_macs": before.macs,
        "dense_params": before.params,
        "checkpoint": str(settings.out),
    }
    print(
        f"{settings.out}: {after.macs / 1e9:.2f} GMACs ({after.macs / before.macs - 1:+.0%}), "
        f"{after.params / 1e6:.2f} M parameters ({after.params / before.params - 1:+.0%}) "
        f"at {size[0]} x {size[1]}",
        file=sys.stderr,
    )
    write_json(figures, settings.json)
    return 0


def _advance(bar: "tqdm[NoReturn]", layer: str) -> None:
    bar.set_postfix_str(layer)
    bar.update()
