"""Small images of classes that stay in memory, decoded once, and are augmented in batches where they lie.

What happens to an image depends on (seed, epoch, index) alone, not on the device nor on the batches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from norton_deploy.data.classification import Split, class_folders, list_class_files, require_known
from norton_deploy.data.image_file import read_picture
from norton_deploy.errors import UserError, one_line_errors

CHUNK = 256  # images that a process decodes at a time
BINARY_FILES = {"train": [f"data_batch_{number}.bin" for number in range(1, 6)], "val": ["test_batch.bin"]}
BINARY_SIZE = (32, 32)


@dataclass(frozen=True)
class ResidentImages:
    """Attributes:
    pixels: uint8 [N, H, W, 3], RGB; channels last, as convolutions want them.
    labels: int64 [N], indices into `classes`.
    classes: in the order of the labels.
    names: what names each image to a person.
    mean, std: of the RGB channels, 0..1, float32 [3].
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    names: Sequence[str]
    mean: Tensor
    std: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> ResidentImages:
        """The same images there."""
        moved = {name: getattr(self, name).to(device) for name in ("pixels", "labels", "mean", "std")}
        return replace(self, **moved)

    def normalised(self, pixels: Tensor) -> Tensor:
        """uint8 [N, H, W, 3] -> float32 [N, 3, H, W], (pixels / 255 - mean) / std, channels last in memory."""
        return ((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


class Augmentation:
    """What an epoch does to images: shifted by up to an eighth of their size over mirrored surroundings, mirrored,
    and cut out (T. DeVries, G. Taylor: Improved regularization of convolutional neural networks with cutout, 2017).

    Args:
        images: on any device.
        seed, epoch: choose crops, mirroring and cut-outs.
        cutout: side of a square that takes the mean colour, its centre anywhere; 0 for none.
    """

    def __init__(self, images: ResidentImages, seed: int, epoch: int, *, cutout: int = 0) -> None:
        self.images, self.cutout = images, cutout
        count, *self.size = images.pixels.shape[:3]
        state = np.random.SeedSequence((seed, epoch)).generate_state(1, np.uint64)
        # on the CPU, so that every device sees the same images
        generator = torch.Generator().manual_seed(int(state[0] >> 1))
        uniform = torch.rand(count, 5, generator=generator)
        border = torch.tensor([max(1, side // 8) for side in self.size])
        shift = (uniform[:, :2] * (2 * border + 1)).floor().long() - border
        centre = (uniform[:, 2:4] * torch.tensor(self.size)).floor().long()
        device = images.pixels.device
        self._shift, self._centre, self._mirrored = (
            shift.to(device),
            centre.to(device),
            (uniform[:, 4] < 0.5).to(device),
        )

    def __call__(self, indices: Tensor) -> Tensor:
        """The images of these indices (int64 [B] on the images' device), uint8 [B, H, W, 3]."""
        height, width = self.size
        shift, centre, device = self._shift[indices], self._centre[indices], indices.device
        y, x = torch.arange(height, device=device), torch.arange(width, device=device)
        rows = _reflected(y + shift[:, :1], height)
        columns = _reflected(torch.where(self._mirrored[indices, None], x.flip(0), x) + shift[:, 1:], width)
        pixels = self.images.pixels[indices[:, None, None], rows[:, :, None], columns[:, None, :]]
        if self.cutout:
            inside_y, inside_x = (
                (place - centre[:, [axis]] + self.cutout // 2).div(self.cutout, rounding_mode="floor") == 0
                for axis, place in enumerate((y, x))
            )
            mean = (255 * self.images.mean).round().to(torch.uint8)
            pixels = torch.where((inside_y[:, :, None] & inside_x[:, None])[..., None], mean, pixels)
        return pixels


def read_resident_images(
    root: Path,
    split: Split,
    *,
    image_size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    classes: Sequence[str] | None = None,
    workers: int = 0,
) -> ResidentImages:
    """Read a split of a folder: CLASS/* as `list_class_files`, or CIFAR-10's original binary version.

    Args:
        root: folder with train/ and val/ or test/; or with data_batch_1.bin and so on (cifar-10-batches-bin).
        image_size: (height, width) in pixels; images of another size are resized.
        mean, std: of the RGB channels, 0..1.
        classes: in the order of the labels; see `list_class_files`.

    Raises:
        UserError: as `list_class_files`; a file is no image, or all together are too large for the memory.
    """
    colours = torch.tensor(mean), torch.tensor(std)
    if is_binary(root):
        return _read_binary(root, split, image_size, colours, classes)
    files = list_class_files(root, split, classes)
    need = len(files.names) * image_size[0] * image_size[1] * 3
    if need > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
        raise UserError(
            f"{files.folder}: {len(files.names)} images of {image_size[0]} x {image_size[1]} px take "
            f"{need / 2**30:.1f} GiB, more than half of this machine's memory; --style imagenet reads them one by one"
        )
    loader = DataLoader(_Pictures(files.paths(), image_size), CHUNK, num_workers=workers)
    pixels = torch.cat(list(one_line_errors(loader)))
    return ResidentImages(pixels, torch.from_numpy(files.labels), files.classes, files.names, *colours)


def read_class_names(root: Path) -> tuple[str, ...]:
    """The classes of root/train/, or of CIFAR-10's binary version, in the order of their labels.

    Raises:
        UserError: as `read_resident_images`.
    """
    return tuple(_binary_classes(root)) if is_binary(root) else class_folders(root)


def is_binary(root: Path) -> bool:
    """Whether a folder holds CIFAR-10's original binary version."""
    return (root / BINARY_FILES["train"][0]).is_file()


class _Pictures(Dataset[Tensor]):
    """uint8 [H, W, 3] of every file."""

    def __init__(self, paths: Sequence[Path], image_size: tuple[int, int]) -> None:
        self.paths, self.image_size = paths, image_size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        picture, size = read_picture(self.paths[index]), self.image_size[::-1]
        picture = picture if picture.size == size else picture.resize(size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(picture))


def _read_binary(
    root: Path,
    split: Split,
    image_size: tuple[int, int],
    colours: tuple[Tensor, Tensor],
    classes: Sequence[str] | None,
) -> ResidentImages:
    """CIFAR-10's records of 1 byte label and 32 x 32 bytes red, green and blue; names in batches.meta.txt."""
    if image_size != BINARY_SIZE:
        raise UserError(f"{root}: CIFAR-10's images have 32 x 32 px, not {image_size[0]} x {image_size[1]}")
    found = _binary_classes(root)
    try:
        contents = {name: (root / name).read_bytes() for name in BINARY_FILES[split]}
    except OSError as error:
        raise UserError(f"{root}: cannot read CIFAR-10's binary version ({error})") from error
    known = require_known(root, found, found if classes is None else classes)
    labels, pixels, names = [], [], []
    for name, content in contents.items():
        record = 1 + 3 * BINARY_SIZE[0] * BINARY_SIZE[1]
        if not content or len(content) % record:
            raise UserError(f"{root / name}: {len(content)} bytes are no whole records of {record}; fetch it again")
        records = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
        if int(records[:, 0].max()) >= len(found):
            raise UserError(f"{root / name}: label {int(records[:, 0].max())}, but there are {len(found)} classes")
        labels.append(records[:, 0].long())
        pixels.append(records[:, 1:].reshape(-1, 3, *BINARY_SIZE).permute(0, 2, 3, 1))
        names += [f"{name}:{index}" for index in range(len(records))]
    in_order = torch.tensor([known[name] for name in found])[torch.cat(labels)]
    return ResidentImages(torch.cat(pixels).contiguous(), in_order, tuple(known), names, *colours)


def _binary_classes(root: Path) -> list[str]:
    try:
        return (root / "batches.meta.txt").read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{root}: cannot read the names of CIFAR-10's classes ({error})") from error


def _reflected(place: Tensor, length: int) -> Tensor:
    """Places beyond the edges, mirrored at the first and last pixel: -1 -> 1, length -> length - 2."""
    place = place.abs()
    return torch.where(place >= length, 2 * (length - 1) - place, place)
