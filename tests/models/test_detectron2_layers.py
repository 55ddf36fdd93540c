"""Anchors, RoIAlign, resizing and pasting in the ways that torchvision's detectors do not have."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.models.detection.image_list import ImageList
from torchvision.models.resnet import Bottleneck
from torchvision.ops import roi_align

from norton_deploy.errors import UserError
from norton_deploy.masks import MasksInBoxes
from norton_deploy.models.detector_parts import BackboneSettings, Detectron2Settings, RoiSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.models.detectron2_layers import (
    DetectorTransform,
    ImageResize,
    PyramidAnchorGenerator,
    PyramidRoIAlign,
    paste_subpixel,
    resize_like_pillow,
    shortest_edge_size,
)


def test_anchors_lie_on_the_given_strides() -> None:
    generator = PyramidAnchorGenerator(((32,), (64,)), ((0.5, 2.0),) * 2, (4, 8), rounding=False, offset=0.5)
    image = ImageList(torch.empty(1, 3, 20, 36), [(20, 36)])
    anchors = generator(image, [torch.empty(1, 1, 5, 9), torch.empty(1, 1, 3, 5)])[0]
    assert anchors.shape == (2 * (5 * 9 + 3 * 5), 4)
    row, column, ratio = 3, 7, 1
    found = anchors[(row * 9 + column) * 2 + ratio]
    half_width, half_height = 16 / np.sqrt(2.0), 16 * np.sqrt(2.0)
    x, y = (column + 0.5) * 4, (row + 0.5) * 4
    expected = torch.tensor([x - half_width, y - half_height, x + half_width, y + half_height])
    torch.testing.assert_close(found, expected.float())
    x, y = 4.5 * 8, 2.5 * 8
    torch.testing.assert_close(anchors[-2, :2] + anchors[-2, 2:], torch.tensor([2 * x, 2 * y]))


@pytest.mark.parametrize("aligned", [True, False])
def test_pyramid_roi_align_pools_each_roi_from_its_level(aligned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = {str(k): torch.randn(2, 3, 64 >> k, 64 >> k, generator=generator) for k in range(4)}
    pool = PyramidRoIAlign(["0", "1", "2", "3"], 7, 0, (4, 8, 16, 32), aligned=aligned)
    # sides just below and at 112, 224 and 448: levels 0, 1, 1, 2, 2, 3; and a point
    sides = [111.9, 112.0, 223.9, 224.0, 447.9, 448.0, 0.0]
    boxes = torch.tensor([[3.3, 5.1, 3.3 + side, 5.1 + side] for side in sides])
    boxes[1::2] = torch.tensor([[0.0, 0.0, side, side] for side in sides[1::2]])  # exact areas
    found = pool(maps, [boxes[:4], boxes[4:]], [(256, 256)] * 2)
    levels = [0, 1, 1, 2, 2, 3, 0]
    for row, (box, level) in enumerate(zip(boxes, levels, strict=True)):
        roi = torch.cat([torch.tensor([float(row >= 4)]), box])[None]
        expected = roi_align(maps[str(level)], roi, 7, 1 / (4 << level), 0, aligned)
        assert torch.equal(found[row], expected[0]), sides[row]


@pytest.mark.parametrize("size", [(31, 47), (80, 33), (40, 60), (7, 5), (133, 20)])
def test_resizing_equals_pillow_to_the_bit(size: tuple[int, int]) -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (40, 60, 3)).astype(np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))
    image = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
    found = (resize_like_pillow(image, size) * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
    assert np.array_equal(found, expected)


def test_sizes_are_rounded_not_cut() -> None:
    assert shortest_edge_size((480, 640), 800, 1333) == (800, 1067)  # torchvision: 1066
    assert shortest_edge_size((427, 640), 800, 1333) == (800, 1199)
    assert shortest_edge_size((300, 900), 800, 1333) == (444, 1333)
    assert shortest_edge_size((900, 300), 800, 1333) == (1333, 444)


def test_subpixel_masks_are_grid_samples_in_torch_and_on_the_host() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(4, 28, 28, generator=generator)
    boxes = torch.tensor([[3.4, 5.6, 30.2, 20.9], [-4.0, -3.0, 12.0, 9.5], [35.0, 30.0, 60.0, 55.0], [8, 8, 8.0, 9]])
    found = paste_subpixel(masks, boxes, (40, 50))
    y, x = torch.meshgrid(torch.arange(40) + 0.5, torch.arange(50) + 0.5, indexing="ij")
    for index, (x1, y1, x2, y2) in enumerate(boxes[:3].tolist()):
        grid = torch.stack([(x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1], dim=-1)
        expected = F.grid_sample(masks[index][None, None], grid[None], align_corners=False)[0, 0]
        torch.testing.assert_close(found[index], expected, atol=1e-5, rtol=0)
    assert torch.isfinite(found).all()
    host = MasksInBoxes(masks.numpy(), boxes.numpy(), (40, 50), "subpixel").paste()
    assert ((found > 0.5).numpy() != host).mean() < 1e-4
    assert host[:3].any(axis=(1, 2)).all()


def test_stride_moves_to_the_first_convolution() -> None:
    body = BackboneSettings().build(stride_in_1x1=True).body
    strides = {
        name: (block.conv1.stride, block.conv2.stride)
        for name, block in body.named_modules()
        if isinstance(block, Bottleneck)
    }
    assert strides["layer2.0"] == strides["layer4.0"] == ((2, 2), (1, 1))
    assert strides["layer1.0"] == strides["layer2.1"] == ((1, 1), (1, 1))


def test_settings_that_need_strides_say_so() -> None:
    for changes in ({"roi_align_aligned": True}, {"anchor_rounding": False}, {"anchor_offset": 0.5}):
        with pytest.raises(UserError, match="needs level_strides"):
            Detectron2Settings(**changes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="one for each of 5 levels"):
        Detectron2Settings(level_strides=(4, 8))


def test_keypoint_probabilities_are_those_of_the_heatmap() -> None:
    settings = DetectorSettings(
        num_classes=2,
        roi=RoiSettings(keypoint_channels=(8,)),
        detectron2=Detectron2Settings(keypoint_score="probability"),
    )
    torch.manual_seed(0)
    predictor = settings.build("keypoint").roi_heads.keypoint_predictor
    with torch.no_grad():
        heatmaps = predictor(torch.randn(2, 8, 14, 14))
    assert heatmaps.shape == (2, 17, 56, 56)
    torch.testing.assert_close(heatmaps.exp().sum((2, 3)), torch.ones(2, 17))


@pytest.mark.parametrize("image_resize", ["torchvision", "antialiased"])
def test_an_image_of_which_nothing_would_be_left_is_refused(image_resize: ImageResize) -> None:
    changes: dict[str, Any] = {"image_resize": image_resize, "mask_paste": "whole_pixels", "keypoint_score": "logit"}
    transform = DetectorTransform(64, 100, [0.0] * 3, [1.0] * 3, **changes).eval()
    assert transform.resize(torch.zeros(3, 1, 99))[0].shape == (3, 1, 100)
    with pytest.raises(UserError, match="an image of 300x3 pixels is too thin"):
        transform.resize(torch.zeros(3, 300, 3))
