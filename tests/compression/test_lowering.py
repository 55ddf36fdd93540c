"""The lowered forms compute what block and normalisation compute in evaluation mode."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.lowering import fold_norm, lower_block
from norton_deploy.errors import UserError

FORMS = ("separable", "grouped", "dense")


def with_statistics(norm: nn.Module) -> nn.Module:
    """A normalisation whose numbers are those of a trained one, not of a new one."""
    channels = len(norm.running_mean)
    norm.running_mean.copy_(torch.randn(channels))
    norm.running_var.copy_(torch.rand(channels) + 0.2)
    if norm.weight is not None:
        norm.weight.data.copy_(torch.randn(channels))
        norm.bias.data.copy_(torch.randn(channels))
    return norm.eval()


NORMS: dict[str, Callable[[int], nn.Module | None]] = {
    "none": lambda channels: None,
    "batch": lambda channels: with_statistics(nn.BatchNorm2d(channels)),
    "no affine": lambda channels: with_statistics(nn.BatchNorm2d(channels, affine=False)),
    "frozen": lambda channels: with_statistics(FrozenBatchNorm2d(channels)),
}


@torch.no_grad()
def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest value."""
    assert actual.shape == expected.shape
    assert float((actual - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kernel", "rank"),
    [((3, 3), 1), ((3, 3), 2), ((3, 3), 9), ((1, 3), 3), ((3, 1), 1), ((2, 2), 2), ((5, 3), 4)],
)
def test_every_form_is_exact(form: str, kernel: tuple[int, int], rank: int) -> None:
    torch.manual_seed(0)
    geometries = [*product((1, (2, 1)), (0, (2, 1)), (1, (1, 2))), (1, "same", 1), (2, 1, 1)]
    for stride, padding, dilation in geometries:
        for bias, norm_kind in product((True, False), NORMS):
            block = CPDBlock(8, 6, kernel, rank, stride, padding, dilation, bias)
            if block.bias is not None:
                nn.init.normal_(block.bias)
            norm = NORMS[norm_kind](6)
            x = torch.randn(2, 8, 11, 12)
            expected = block(x) if norm is None else norm(block(x))
            assert_same(lower_block(block, norm, form)(x), expected)


def test_the_layers_of_each_form() -> None:
    block = CPDBlock(16, 10, 3, rank=2, stride=2, padding=1, bias=False)
    separable = lower_block(block, with_statistics(nn.BatchNorm2d(10)), "separable")
    assert [tuple(layer.weight.shape) for layer in separable] == [(20, 16, 1, 1), (20, 1, 1, 3), (10, 2, 3, 1)]
    grouped = lower_block(block, None, "grouped")
    assert [tuple(layer.weight.shape) for layer in grouped] == [(20, 16, 1, 1), (10, 2, 3, 3)]
    assert [layer.bias is None for layer in grouped] == [True, True]
    dense = lower_block(block, None, "dense")
    assert tuple(dense.weight.shape) == (10, 16, 3, 3)
    assert not dense.training and not any(parameter.requires_grad for parameter in grouped.parameters())


@pytest.mark.parametrize("kind", ["batch", "no affine", "frozen"])
def test_folding_an_ordinary_convolution(kind: str) -> None:
    torch.manual_seed(1)
    for groups, bias in product((1, 4), (True, False)):
        conv = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=groups, bias=bias, padding_mode="reflect")
        norm = NORMS[kind](12)
        x = torch.randn(2, 8, 9, 9)
        assert_same(fold_norm(conv, norm)(x), norm(conv(x)))


def test_a_norm_in_training_mode_is_folded_with_its_running_statistics() -> None:
    torch.manual_seed(2)
    block, norm, x = CPDBlock(8, 6, 3, rank=2), with_statistics(nn.BatchNorm2d(6)), torch.randn(2, 8, 7, 7)
    expected = norm(block(x))
    assert_same(lower_block(block, norm.train(), "grouped")(x), expected)


def test_the_block_is_not_changed() -> None:
    block = CPDBlock(8, 6, 3, rank=2)
    before = {name: value.clone() for name, value in block.state_dict().items()}
    for form in FORMS:
        lower_block(block, with_statistics(nn.BatchNorm2d(6)), form)
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())
    assert all(parameter.requires_grad for parameter in block.parameters())


def test_what_cannot_be_lowered_is_named() -> None:
    block = CPDBlock(8, 6, 3, rank=2)
    with pytest.raises(UserError, match="'fast'"):
        lower_block(block, None, "fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="GroupNorm"):
        lower_block(block, nn.GroupNorm(2, 6), "dense")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="running statistics"):
        lower_block(block, nn.BatchNorm2d(6, track_running_stats=False), "dense")
