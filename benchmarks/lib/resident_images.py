"""Small images that stay in memory, decoded once, and are cropped and mirrored in whole epochs where they lie.

What happens to an image depends on (seed, epoch, index) alone, not on the device nor on the batches.
"""

from __future__ import annotations

import multiprocessing
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from norton_deploy.data.image_file import read_image
from norton_deploy.errors import UserError

Split = Literal["train", "val"]
FOLDERS: dict[str, Split] = {"train": "train", "val": "val", "test": "val"}
CHUNK = 500  # images that a process decodes at a time


@dataclass(frozen=True)
class ResidentImages:
    """Attributes:
    pixels: uint8 [N, H, W, 3], RGB; channels last, as convolutions on a GPU want them.
    labels: int64 [N], indices into `classes`.
    classes: names, sorted.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ResidentImages:
        """The same images there."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def epoch(self, seed: int, epoch: int, *, border: int = 4, cutout: int = 0) -> tuple[Tensor, Tensor]:
        """All images in the order of an epoch, each cropped at random from its reflected surroundings and mirrored.

        Args:
            seed, epoch: choose order, crops, mirroring and cut-outs.
            border: pixels by which a crop may be shifted each way; less than height and width.
            cutout: side of a square that takes the mean colour of all images, its centre anywhere; 0 for none.

        Returns:
            pixels uint8 [N, H, W, 3] and labels int64 [N].
        """
        count, height, width, _ = self.pixels.shape
        state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
        # on the CPU, so that every device sees the same images
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        order = torch.randperm(count, generator=generator)
        shift = torch.randint(-border, border + 1, (count, 2), generator=generator)
        mirrored = torch.rand(count, generator=generator) < 0.5
        centre = torch.rand(count, 2, generator=generator)
        device = self.pixels.device
        order, shift, mirrored, centre = (
            part[order].to(device) for part in (torch.arange(count), shift, mirrored, centre)
        )
        rows = _reflected(torch.arange(height, device=device) + shift[:, :1], height)
        columns = torch.arange(width, device=device)
        columns = torch.where(mirrored[:, None], columns.flip(0), columns)
        columns = _reflected(columns + shift[:, 1:], width)
        pixels = self.pixels[order[:, None, None], rows[:, :, None], columns[:, None, :]]
        if cutout:
            inside = [
                (torch.arange(side, device=device) - (centre[:, [axis]] * side).floor() + cutout // 2)
                .div(cutout)
                .floor()
                == 0
                for axis, side in enumerate((height, width))
            ]
            mean = self.pixels.float().mean((0, 1, 2)).round().to(torch.uint8)
            pixels = torch.where((inside[0][:, :, None] & inside[1][:, None, :])[..., None], mean, pixels)
        return pixels, self.labels[order]


def normalised(pixels: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], (pixels / 255 - mean) / std, channels last in memory."""
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2)


def read_resident_images(
    source: Path, *, per_class: int | None = None, workers: int = 0
) -> dict[Split, ResidentImages]:
    """Read train/CLASS/* and val/CLASS/* (or test/CLASS/*) from a folder or a tar archive, both sets at once.

    Args:
        source: the folder, or the archive (.tar, .tar.gz, .tar.xz, ...).
        per_class: only so many images of each class, the first by name.
        workers: processes that decode; start none of them once CUDA is in use.

    Raises:
        UserError: nothing is there, a file is no image, or not all images have the same size.
    """
    found: dict[tuple[Split, str], list[tuple[str, bytes]]] = {}
    for path, content in _files(source):
        parts = PurePosixPath(path).parts
        if len(parts) == 3 and parts[0] in FOLDERS:
            found.setdefault((FOLDERS[parts[0]], parts[1]), []).append((path, content))
    classes = tuple(sorted({name for _, name in found}))
    sets: dict[Split, ResidentImages] = {}
    for split in ("train", "val"):
        groups = [sorted(found.get((split, name), []))[:per_class] for name in classes]
        if not any(groups):
            raise UserError(f"{source}: no images for '{split}'; expected train/CLASS/*.jpg and test/CLASS/*.jpg")
        pixels = _decoded([file for group in groups for file in group], workers)
        labels = torch.repeat_interleave(torch.arange(len(classes)), torch.tensor([len(group) for group in groups]))
        sets[split] = ResidentImages(torch.from_numpy(pixels), labels, classes)
    return sets


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    """Path below the source and content of every file."""
    if source.is_dir():
        for path in sorted(source.glob("*/*/*")):
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    try:
        with tarfile.open(source) as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is not None:
                    yield member.name.removeprefix("./"), stream.read()
    except (OSError, tarfile.TarError) as error:
        raise UserError(f"{source}: neither a folder nor a tar archive ({error})") from error


def _decoded(files: Sequence[tuple[str, bytes]], workers: int) -> np.ndarray:
    """uint8 [N, H, W, 3]."""
    rest = iter(files)
    chunks = list(iter(lambda: list(islice(rest, CHUNK)), []))
    if workers > 1:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            parts: Iterable[np.ndarray] = pool.map(_decode, chunks)
    else:
        parts = map(_decode, chunks)
    images = list(parts)
    if sizes := {part.shape[1:] for part in images} - {images[0].shape[1:]}:
        raise UserError(f"images of {images[0].shape[1:]} and of {sizes.pop()}: all must have the same size")
    return np.concatenate(images)


def _decode(files: Sequence[tuple[str, bytes]]) -> np.ndarray:
    decoded = []
    for path, content in files:
        decoded.append(read_image(path, content))
        if decoded[-1].shape != decoded[0].shape:
            raise UserError(f"{path}: {decoded[-1].shape}, others {decoded[0].shape}: all must have the same size")
    return np.stack(decoded)


def _reflected(place: Tensor, length: int) -> Tensor:
    """Places beyond the edges, mirrored at the first and last pixel: -1 -> 1, length -> length - 2."""
    place = place.abs()
    return torch.where(place >= length, 2 * (length - 1) - place, place)
