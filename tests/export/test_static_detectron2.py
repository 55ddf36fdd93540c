"""Static parts in the settings of imported Detectron2 models."""

import pytest
import torch

from norton_deploy.errors import UserError
from norton_deploy.export.static_heads import StaticKeypointHead
from norton_deploy.export.static_rcnn import GraphSettings, StaticRCNN
from norton_deploy.export.static_roi_align import EXPORTED_SAMPLES, StaticRoIAlign, fix_sampling, is_adaptive
from norton_deploy.models.detector_parts import BackboneSettings, Detectron2Settings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.models.detectron2_layers import PyramidRoIAlign

SETTINGS = DetectorSettings(
    num_classes=2,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    roi=RoiSettings(box_features=16, keypoint_channels=(16,), mask_channels=(16,)),
    detectron2=Detectron2Settings(
        level_strides=(4, 8, 16, 32, 64),
        anchor_rounding=False,
        roi_align_aligned=True,
        roi_sampling_ratio=0,
        mask_paste="subpixel",
        keypoint_score="probability",
    ),
    rpn=RpnSettings(pre_nms=(50, 50), post_nms=(20, 20)),
)


@pytest.mark.parametrize("aligned", [True, False])
def test_static_roi_align_follows_strides_and_alignment(aligned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {str(k): (24 >> k, 32 >> k) for k in range(4)}
    maps = {name: torch.randn(1, 5, *size, generator=generator) for name, size in sizes.items()}
    pooler = PyramidRoIAlign(list(sizes), 7, 2, (4, 8, 16, 32), aligned=aligned)
    # 65 x 97 pixels, padded to 96 x 128: torchvision would infer a scale of 1/16 for the last level
    static = StaticRoIAlign(pooler, sizes, (65, 97))
    low = torch.rand(60, 2, generator=generator) * 60
    boxes = torch.cat([low, low + torch.rand(60, 2, generator=generator) ** 3 * 500], dim=1)
    boxes[0, 2:] = boxes[0, :2]
    expected = pooler(maps, [boxes], [(65, 97)]).permute(0, 2, 3, 1)
    torch.testing.assert_close(static(maps, boxes[None]), expected, atol=2e-5, rtol=0)


def test_adaptive_sampling_is_fixed_in_a_copy() -> None:
    model = SETTINGS.build("mask").eval()
    assert is_adaptive(model)
    with pytest.raises(UserError, match="adaptive"):
        StaticRCNN(model, GraphSettings((64, 64)))
    fixed = fix_sampling(model)
    assert not is_adaptive(fixed) and is_adaptive(model)
    assert fixed.roi_heads.mask_roi_pool.sampling_ratio == EXPORTED_SAMPLES
    assert StaticRCNN(fixed, GraphSettings((64, 64))).mask_paste == "subpixel"


def test_keypoint_scores_are_probabilities() -> None:
    torch.manual_seed(0)
    heads = SETTINGS.build("keypoint").eval().roi_heads
    static = StaticKeypointHead(heads, (64, 64))
    pooled = torch.randn(3, 14, 14, 16)
    with torch.no_grad():
        expected = heads.keypoint_predictor(heads.keypoint_head(pooled.permute(0, 3, 1, 2)))
        maps = static(pooled)
        # a box of 56 x 56 pixels: the resized heatmap is the heatmap
        boxes = torch.tensor([[4.0, 4.0, 60.0, 60.0]]).expand(3, 4)
        keypoints = static.keypoints(maps, boxes)
    torch.testing.assert_close(static.heatmaps(maps), expected)
    torch.testing.assert_close(keypoints[..., 2], expected.exp().amax((2, 3)))
