from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from norton_deploy.export.static_boxes import StaticNMS, nms_unrolled

FORMS = {
    "native": StaticNMS(native=True),
    "unrolled": StaticNMS(native=False, iterations=60),
    "counts in fp16": StaticNMS(native=False, iterations=60),
}
FORMS["counts in fp16"].counts = torch.float16


def crowded_boxes(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 60
    return torch.cat([low, low + 5 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def reference(boxes: Tensor, valid: Tensor, groups: Tensor, threshold: float) -> Tensor:
    """torchvision's nms on the valid boxes of each group."""
    keep = torch.zeros_like(valid)
    order = torch.arange(len(boxes), 0, -1, dtype=torch.float32)
    for group in groups.unique():
        chosen = (valid & (groups == group)).nonzero().squeeze(1)
        keep[chosen[nms(boxes[chosen], order[chosen], threshold)]] = True
    return keep


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("seed", range(8))
def test_same_boxes_as_torchvision(form: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(100 + seed)
    boxes = torch.stack([crowded_boxes(seed, 200), crowded_boxes(seed + 50, 200)])
    valid = torch.rand(2, 200, generator=generator) > 0.2
    groups = torch.randint(0, 3, (2, 200), generator=generator)
    keep, converged = FORMS[form](boxes, valid, groups, 3, 0.4)
    assert converged
    for image in range(2):
        expected = reference(boxes[image], valid[image], groups[image], 0.4)
        assert torch.equal(keep[image], expected)
        assert 0 < expected.sum() < valid[image].sum()


def chain(length: int) -> Tensor:
    """Boxes of which each overlaps its neighbours only, by IoU 0.6: every second one stays."""
    low = torch.arange(length, dtype=torch.float32) * 2.5
    zeros = torch.zeros(length)
    return torch.stack([low, zeros, low + 10, zeros + 10], dim=1)


@pytest.mark.parametrize("form", FORMS)
def test_a_chain_of_suppressions(form: str) -> None:
    boxes = chain(40)[None]
    keep, converged = FORMS[form](boxes, torch.ones(1, 40, dtype=torch.bool), None, 1, 0.5)
    assert converged
    assert keep[0].tolist() == [index % 2 == 0 for index in range(40)]


def test_too_few_steps_are_reported() -> None:
    keep, converged = nms_unrolled(chain(40), torch.ones(40, dtype=torch.bool), None, 0.5, iterations=20)
    assert not converged
    assert keep[:20].tolist() == [index % 2 == 0 for index in range(20)]


def test_more_suppressors_than_fp16_can_count() -> None:
    same = torch.tensor([[0.0, 0, 10, 10]]).expand(3000, 4)
    keep, converged = nms_unrolled(same, torch.ones(3000, dtype=torch.bool), None, 0.5, 3, torch.float16)
    assert converged and keep.tolist() == [True] + [False] * 2999


@pytest.mark.parametrize("form", FORMS)
def test_invalid_boxes_suppress_nothing(form: str) -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 10, 9]]])
    keep, _ = FORMS[form](boxes, torch.tensor([[False, True, True]]), None, 1, 0.5)
    assert keep[0].tolist() == [False, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_groups_are_labels_not_shifted_coordinates(form: str) -> None:
    """Far-apart labels at large coordinates: a shift by label * width would round the small boxes together."""
    boxes = (torch.tensor([[[0.0, 0, 0.01, 0.01], [0, 0, 0.01, 0.004]]]) + 1000).contiguous()
    call: Callable[..., tuple[Tensor, Tensor]] = FORMS[form]
    keep, _ = call(boxes, torch.ones(1, 2, dtype=torch.bool), torch.tensor([[90, 89]]), 91, 0.1)
    assert keep.all()
