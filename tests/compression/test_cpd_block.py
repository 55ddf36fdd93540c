"""CPDBlock against the convolution it stands for."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.errors import UserError
from norton_deploy.method.cp import decompose_filters, max_rank

KERNELS = [(1, 3), (3, 1), (2, 2), (3, 3), (2, 5), (5, 5)]
GEOMETRIES = [
    *product((1, 2, (2, 1)), (0, 1, (2, 1)), (1, 2, (1, 2))),
    *product((1,), ("same", "valid"), (1, 2)),
]


def geometry_label(geometry: tuple[object, ...]) -> str:
    return "stride={} padding={} dilation={}".format(*geometry)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=geometry_label)
@pytest.mark.parametrize("kernel", KERNELS)
def test_forward_is_the_recomposed_convolution(kernel: tuple[int, int], geometry: tuple) -> None:
    torch.manual_seed(0)
    stride, padding, dilation = geometry
    for rank, bias in ((1, True), (2, False), (max_rank(6, *kernel), True)):
        conv = nn.Conv2d(6, 5, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
        block = CPDBlock.from_factors(decompose_filters(conv.weight, rank), conv).eval()
        x = torch.randn(2, 6, 15, 17)
        recomposed = F.conv2d(x, block.dense_weight(), conv.bias, stride, padding, dilation)
        torch.testing.assert_close(block(x), recomposed, rtol=1e-4, atol=1e-4)
        if rank == max_rank(6, *kernel):
            torch.testing.assert_close(block(x), conv(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(block.train()(x), recomposed, rtol=1e-4, atol=1e-4)


def test_forward_is_equations_4_to_7_step_by_step() -> None:
    torch.manual_seed(1)
    block = CPDBlock(4, 3, (3, 2), rank=2, bias=False).eval()
    factors, x = block.factors(), torch.randn(1, 4, 5, 6)
    for k in range(3):
        eq_4 = torch.einsum("pij,pr->rij", x[0], factors.C[k])
        eq_5 = sum(eq_4[:, :, n : n + 5] * factors.B[k, n][:, None, None] for n in range(2))
        eq_6 = sum(eq_5[:, m : m + 3, :] * factors.A[k, m][:, None, None] for m in range(3))
        torch.testing.assert_close(block(x)[0, k], eq_6.sum(dim=0))


def test_factors_go_in_and_come_out() -> None:
    conv = nn.Conv2d(12, 7, 3, padding=1)
    factors = decompose_filters(conv.weight, 3)
    block = CPDBlock.from_factors(factors, conv)
    for name in "ABC":
        assert torch.equal(getattr(block.factors(), name), getattr(factors, name))
    torch.testing.assert_close(block.dense_weight(), factors.reconstruct())
    assert (block.in_channels, block.out_channels, block.kernel_size, block.rank) == (12, 7, (3, 3), 3)
    assert (block.stride, block.padding, block.dilation) == ((1, 1), (1, 1), (1, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_parameter_count_of_section_2a(bias: bool) -> None:
    block = CPDBlock(32, 20, (3, 5), rank=4, bias=bias)
    assert sum(p.numel() for p in block.parameters()) == 4 * 20 * (32 + 3 + 5) + (20 if bias else 0)


def test_selection_cuts_filters_and_inputs() -> None:
    torch.manual_seed(2)
    conv = nn.Conv2d(12, 8, 3, stride=2, padding=1)
    block = CPDBlock.from_factors(decompose_filters(conv.weight, 2), conv).eval()
    filters, inputs = torch.tensor([6, 0, 3]), torch.tensor([1, 2, 5, 7, 11])
    x = torch.randn(2, 12, 9, 9)
    torch.testing.assert_close(block.select_filters(filters)(x), block(x)[:, filters])
    masked = torch.zeros_like(x)
    masked[:, inputs] = x[:, inputs]
    torch.testing.assert_close(block.select_inputs(inputs)(x[:, inputs]), block(masked))
    assert block.select_filters(filters).out_channels == 3
    assert block.select_inputs(inputs).in_channels == 5


def test_structure_alone_builds_on_the_meta_device() -> None:
    block = CPDBlock(64, 48, 3, rank=2, stride=2, padding=1, device="meta").eval()
    assert all(parameter.is_meta for parameter in block.parameters())
    assert block(torch.empty(1, 64, 32, 32, device="meta")).shape == (1, 48, 16, 16)


def test_every_parameter_receives_the_gradient_of_the_dense_weight() -> None:
    torch.manual_seed(3)
    conv = nn.Conv2d(8, 4, 3, padding=1)
    block = CPDBlock.from_factors(decompose_filters(conv.weight, 2), conv).eval()
    x, goal = torch.randn(2, 8, 6, 6), torch.randn(2, 4, 6, 6)
    parameters = dict(block.named_parameters())
    direct = torch.autograd.grad((block(x) * goal).sum(), list(parameters.values()))
    recomposed = (F.conv2d(x, block.dense_weight(), block.bias, padding=1) * goal).sum()
    for name, one, other in zip(
        parameters, direct, torch.autograd.grad(recomposed, list(parameters.values())), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=name)


def test_the_sum_over_terms_keeps_the_memory_layout() -> None:
    torch.manual_seed(6)
    block = CPDBlock(8, 6, 3, 2, padding=1).eval()
    x = torch.randn(2, 8, 5, 7)
    last = block.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, F.conv2d(x, block.dense_weight(), block.bias, padding=1))


def test_dtype_and_mode_are_those_of_the_convolution() -> None:
    conv = nn.Conv2d(8, 4, 3).double().eval()
    block = CPDBlock.from_factors(decompose_filters(conv.weight, 9), conv)
    assert block.pointwise.weight.dtype == torch.float64 and not block.training


def test_what_cannot_become_a_block_is_named() -> None:
    factors = decompose_filters(torch.randn(8, 8, 3, 3), 1)
    with pytest.raises(UserError, match="groups=2"):
        CPDBlock.from_factors(factors, nn.Conv2d(8, 8, 3, groups=2))
    with pytest.raises(UserError, match="reflect"):
        CPDBlock.from_factors(factors, nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(UserError, match="1x1"):
        CPDBlock(8, 8, 1, rank=1)
    with pytest.raises(UserError, match=r"rank 10 .* 1 to 9"):
        CPDBlock(8, 8, 3, rank=10)
