"""The scales of RoI pooling follow from a detector's settings, not from the first images that it sees."""

import copy

import pytest
import torch
from torchvision.ops import MultiScaleRoIAlign

from norton_deploy.models.detector_parts import BackboneSettings, ImageSettings, RoiSettings, RpnSettings
from norton_deploy.models.detectors import DetectorSettings

SETTINGS = DetectorSettings(
    num_classes=3,
    backbone=BackboneSettings("resnet18", fpn_channels=16),
    roi=RoiSettings(box_features=16, mask_channels=(16,), score_threshold=0.0, detections_per_image=5),
    image=ImageSettings(96, 128),
    rpn=RpnSettings(post_nms=(20, 20)),
)


@pytest.mark.parametrize("side", [40, 64, 75, 192, 800, 1000])
def test_scales_are_those_that_torchvision_infers_at_the_design_size(side: int) -> None:
    settings = DetectorSettings(
        num_classes=3,
        backbone=BackboneSettings("resnet18", fpn_channels=8),
        roi=RoiSettings(box_features=8, mask_channels=(8,)),
        image=ImageSettings(side, 2 * side),
    )
    model = settings.build("mask").eval()
    names = [name for name in model.state_dict() if "roi_pool" in name]
    assert not names  # Published weights still fit.
    batch, _ = model.transform([torch.rand(3, side, side)])
    with torch.no_grad():
        maps = model.backbone(batch.tensors)
    for pool in (model.roi_heads.box_roi_pool, model.roi_heads.mask_roi_pool):
        stock = MultiScaleRoIAlign(pool.featmap_names, 7, 2)
        stock(maps, [torch.tensor([[0.0, 0.0, side / 2, side / 2]])], batch.image_sizes)
        assert pool.scales == stock.scales
        assert vars(pool.map_levels) == vars(stock.map_levels)


def test_a_first_batch_of_small_images_changes_nothing() -> None:
    torch.manual_seed(0)
    fresh = SETTINGS.build("mask").eval()
    used = copy.deepcopy(fresh)
    used.transform.min_size = (40,)
    image = torch.rand(3, 96, 128)
    with torch.no_grad():
        used([torch.rand(3, 40, 40)])
        used.transform.min_size = fresh.transform.min_size
        expected, found = fresh([image])[0], used([image])[0]
    assert len(expected["boxes"]) > 0
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0)
    assert used.roi_heads.box_roi_pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]
