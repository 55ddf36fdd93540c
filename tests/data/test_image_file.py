"""One reader of pictures: upright, bounded, and suspicious of what is no picture."""

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norton_deploy.data.image_file import MAX_PIXELS, check_decodes, read_image, sizes_of
from norton_deploy.errors import UserError

PIXELS = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
UPRIGHT = {
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.transpose(1, 0, 2),
    6: np.rot90(PIXELS, -1),
    7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(PIXELS),
}


def png(width: int, height: int) -> bytes:
    """A sound PNG of one colour, whatever its size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(9)
    row = b"\0" * (1 + (width + 7) // 8)
    body = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    chunks = [(b"IHDR", header), (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_every_orientation_comes_out_upright(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "a.png"), UPRIGHT[orientation])
    assert sizes_of(tmp_path / "a.png") == (UPRIGHT[orientation].shape[:2], (2, 3))


def test_sixteen_bits_are_not_cut_off(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 256], [32768, 65280, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[..., 0].tolist() == [[0, 0, 1], [128, 255, 255]]
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match="expected 8 or 16 bits a channel"):
        read_image(tmp_path / "a.tif")


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(8192, 8193))
    with pytest.raises(UserError, match=f"bomb.png: has 8192 x 8193 pixels, more than {MAX_PIXELS}"):
        read_image(tmp_path / "bomb.png")
    (tmp_path / "larger.png").write_bytes(png(200_000, 2_000))
    for reader in (read_image, check_decodes, sizes_of):
        with pytest.raises(UserError, match="larger"):
            reader(tmp_path / "larger.png")


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, reason in [("pipe.png", "is a pipe"), ("folder.png", "is a folder"), ("none.png", "cannot read"),
                         ("a\0b", "cannot read"), ("x" * 300, "cannot read")]:  # fmt: skip
        with pytest.raises(UserError, match=reason):
            read_image(tmp_path / name)
    with pytest.raises(UserError, match="is a device; expected a picture"):
        read_image("/dev/zero")


def test_other_formats_are_not_opened(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")  # Pillow would start Ghostscript
    with pytest.raises(UserError, match="picture"):
        read_image(tmp_path / "a.eps")
    for size in (0, 10, 60):
        Image.new("RGB", (64, 64)).save(tmp_path / "a.jpg")
        (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:size])
        with pytest.raises(UserError, match="picture"):
            read_image(tmp_path / "a.jpg")
