"""Convolutions over small maps as matrix products."""

import copy

import pytest
import torch
from torch import nn

from norton_deploy.compression import cpu_forms as small_maps
from norton_deploy.compression.cpu_forms import SmallMapConv2d, use_products_on_small_maps


def gradients(convolution: nn.Conv2d, images: torch.Tensor) -> list[torch.Tensor]:
    """Output, and gradients of images, weight and bias for fixed random gradients of the output."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = convolution(images)
    output.backward(torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype))
    assert images.grad is not None
    tensors = [output, images.grad, *(parameter.grad for parameter in convolution.parameters())]
    assert all(tensor is not None for tensor in tensors)
    return [tensor.detach() for tensor in tensors if tensor is not None]


@pytest.mark.parametrize("size", [(4, 4), (2, 2), (1, 3), (3, 5)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_is_the_convolution_with_its_gradients(
    size: tuple[int, int], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 5, 3, padding=1, bias=bias)
    product = copy.deepcopy(plain)
    use_products_on_small_maps(product)
    assert type(product) is SmallMapConv2d
    images = torch.randn(3, 6, *size)
    exact = gradients(plain.double(), images.double())
    assert {tensor.dtype for tensor in exact} == {torch.float64}  # which autocast leaves alone
    ours = gradients(product, images)
    for mine, reference in zip(ours, exact, strict=True):
        assert (mine.double() - reference.double()).norm() < 0.01 * reference.double().norm()
    monkeypatch.setattr(small_maps, "_neighbourhoods", None)  # what is below must not be a product
    with torch.no_grad():
        torch.testing.assert_close(product(images), plain.float()(images))  # no autocast
        with torch.autocast("cpu", torch.bfloat16):
            product(torch.randn(1, 6, 8, 8))  # a large map


def test_only_plain_convolutions_change_and_state_stays() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, stride=2),
        nn.Conv2d(4, 4, 3, padding=1, groups=4),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    )
    before = copy.deepcopy(model.state_dict())
    use_products_on_small_maps(model)
    assert [type(module) is SmallMapConv2d for module in model] == [True, False, False, False, False]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert type(copy.deepcopy(model)[0]) is SmallMapConv2d
