import pytest
import torch
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_iou, clip_boxes_to_image

from norton_deploy.export.static_boxes import at_least, box_limits, clip_boxes, decode_boxes, gather_rows, pairwise_iou


def random_boxes(*shape: int, side: float = 100.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand(*shape, 2, 2, generator=generator) * side
    return torch.cat([corners.amin(-2), corners.amax(-2)], dim=-1)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)])
def test_decode_equals_torchvision_also_past_the_clip(weights: tuple[float, float, float, float]) -> None:
    boxes = random_boxes(50)
    deltas = torch.randn(50, 4, generator=torch.Generator().manual_seed(1)) * 6
    coder = BoxCoder(weights)
    expected = coder.decode_single(deltas, boxes)
    torch.testing.assert_close(decode_boxes(deltas, boxes, torch.tensor(weights), coder.bbox_xform_clip), expected)


def test_clip_and_size() -> None:
    boxes = random_boxes(40, side=300.0) - 100
    torch.testing.assert_close(clip_boxes(boxes, box_limits((90, 150))), clip_boxes_to_image(boxes, (90, 150)))
    sized = torch.tensor([[0.0, 0, 2, 3], [0, 0, 3, 2], [0, 0, 3, 3]])
    assert at_least(sized, 2.5).tolist() == [False, False, True]


def test_iou_equals_torchvision_and_empty_boxes_overlap_nothing() -> None:
    boxes = random_boxes(3, 30)
    expected = torch.stack([box_iou(part, part) for part in boxes])
    torch.testing.assert_close(pairwise_iou(boxes), expected)
    assert pairwise_iou(torch.zeros(4, 4)).eq(0).all()


def test_gather_rows_per_image() -> None:
    table = torch.arange(24.0).reshape(2, 4, 3)
    index = torch.tensor([[3, 0], [1, 1]])
    assert gather_rows(table, index)[1, 0].tolist() == [15.0, 16.0, 17.0]
    assert gather_rows(table[:1], index[:1])[0, 0].tolist() == [9.0, 10.0, 11.0]
