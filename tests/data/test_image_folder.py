"""Plain images from a folder."""

from pathlib import Path

from PIL import Image

from norton_deploy.data.image_folder import find_images, read_images


def test_classes_come_mixed_and_always_in_the_same_order(tmp_path: Path) -> None:
    for level in range(4):
        for index in range(10):
            (tmp_path / f"class{level}").mkdir(exist_ok=True)
            Image.new("L", (4, 4), 60 * level + index).convert("RGB").save(tmp_path / f"class{level}" / f"{index}.png")
    assert len(find_images(tmp_path)) == 40
    values = [round(float(image[0, 0, 0]) * 255) for image in read_images(tmp_path, 20)]
    assert values == [round(float(image[0, 0, 0]) * 255) for image in read_images(tmp_path, 20)]
    assert sorted(values) == [60 * level + index for level in range(4) for index in range(0, 10, 2)]
    assert len({value // 60 for value in values[:5]}) > 1  # no batch of one class
