"""Frozen BatchNorm under autocast."""

import torch
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.models.classifiers import TypedFrozenBatchNorm2d
from norton_deploy.models.detector_parts import BackboneSettings


def layers(channels: int = 6) -> tuple[TypedFrozenBatchNorm2d, FrozenBatchNorm2d]:
    generator = torch.Generator().manual_seed(0)
    typed, plain = TypedFrozenBatchNorm2d(channels), FrozenBatchNorm2d(channels)
    for name in ("weight", "bias", "running_mean", "running_var"):
        plain.get_buffer(name).copy_(torch.rand(channels, generator=generator) + 0.5)
    typed.load_state_dict(plain.state_dict())
    return typed, plain


def test_half_precision_stays_and_is_rounded_once() -> None:
    typed, plain = layers()
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    for dtype in (torch.bfloat16, torch.float16):
        found = typed(x.to(dtype))
        assert found.dtype == dtype and plain(x.to(dtype)).dtype == torch.float32
        exact = plain(x.to(dtype).float())
        torch.testing.assert_close(found.float(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_float32_is_torchvisions_to_the_bit_and_gradients_agree() -> None:
    typed, plain = layers()
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
    assert torch.equal(typed(x), plain(x))
    (half,) = torch.autograd.grad(typed(x.bfloat16()).float().sum(), x)
    (exact,) = torch.autograd.grad(plain(x).sum(), x)
    torch.testing.assert_close(half, exact, rtol=0.01, atol=0)


def test_a_frozen_body_under_autocast_hands_on_bfloat16() -> None:
    body = BackboneSettings("resnet18").build().body.eval()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        maps = body(torch.rand(1, 3, 32, 32))
    assert {value.dtype for value in maps.values()} == {torch.bfloat16}
