"""Layers in the forms that train quickest: the same Parameters, results and gradients."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.lowering import is_quicker_dense
from norton_deploy.training import forms
from norton_deploy.training.forms import CpuBlock, RecomposedBlock, SmallMapConv2d, recompose_blocks, use_cpu_forms


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
    [product] = use_cpu_forms(nn.Sequential(copy.deepcopy(plain)))
    assert type(product) is SmallMapConv2d
    images = torch.randn(3, 6, *size)
    exact = gradients(plain.double(), images.double())
    assert {tensor.dtype for tensor in exact} == {torch.float64}  # which autocast leaves alone
    ours = gradients(product, images)
    for mine, reference in zip(ours, exact, strict=True):
        assert (mine.double() - reference.double()).norm() < 0.01 * reference.double().norm()
    monkeypatch.setattr(forms, "_neighbourhoods", None)  # what is below must not be a product
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
    before, parameters = copy.deepcopy(model.state_dict()), dict(model.named_parameters())
    assert use_cpu_forms(model) is model
    assert [type(module) is SmallMapConv2d for module in model] == [True, False, False, False, False]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert type(copy.deepcopy(model)[0]) is SmallMapConv2d


@pytest.mark.parametrize(("give", "kind"), [(use_cpu_forms, CpuBlock), (recompose_blocks, RecomposedBlock)])
@pytest.mark.parametrize("bias", [True, False])
def test_blocks_keep_parameters_names_mode_and_geometry(give: Any, kind: type, bias: bool) -> None:
    model = nn.Sequential(
        CPDBlock(4, 6, (3, 2), 2, stride=1 if bias else 2, padding="same" if bias else 1, bias=bias)
    ).eval()
    before, parameters = str(model).replace("CPDBlock", kind.__name__), dict(model.named_parameters())
    assert give(model) is model and type(model[0]) is kind and str(model) == before and not model[0].training
    assert list(parameters) == [name for name, _ in model.named_parameters()]
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize("rank", [1, 8])
def test_without_a_pass_training_runs_the_three_convolutions(rank: int) -> None:
    calls: list[nn.Module] = []
    block = CPDBlock(64, 8, 3, rank, padding=1)
    block.pointwise.register_forward_hook(lambda module, *_: calls.append(module))
    block.train()(torch.randn(1, 64, 6, 6))
    assert len(calls) == 1


@pytest.mark.parametrize("rank", [1, 2, 8])
def test_a_recomposed_block_is_always_one_convolution(rank: int) -> None:
    torch.manual_seed(4)
    check_one_form(recompose_blocks, CPDBlock(64, 8, 3, rank, padding=1), 0)


def check_one_form(give: Any, paper: CPDBlock, convolutions: int) -> None:
    """The output and all gradients of a block's form are those of eq. 4-7; it calls so many of its convolutions."""
    [block] = give(nn.Sequential(paper))
    calls: list[nn.Module] = []
    for part in (block.pointwise, block.horizontal, block.vertical):
        part.register_forward_hook(lambda module, *_: calls.append(module))
    x, goal = torch.randn(2, paper.in_channels, 6, 6), torch.randn(2, 8, 6, 6)
    trained, parameters = block(x), list(paper.parameters())
    assert len(calls) == convolutions
    gradients = torch.autograd.grad((trained * goal).sum(), parameters)
    three = paper(x)
    torch.testing.assert_close(trained, three, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.eval()(x), three, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad((three * goal).sum(), parameters)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("rank", "convolutions"), [(1, 3), (2, 3), (5, 1), (8, 1)])
def test_a_cpu_block_is_one_convolution_where_the_rank_is_high(rank: int, convolutions: int) -> None:
    torch.manual_seed(4)
    block = CPDBlock(256, 8, 3, rank, padding=1)
    assert is_quicker_dense(block) == (convolutions == 1)
    check_one_form(use_cpu_forms, block, 3 if convolutions == 3 else 0)


@pytest.mark.parametrize(("rank", "side", "convolutions"), [(1, 6, 3), (8, 6, 1), (8, 4, 1)])
def test_bfloat16_has_its_own_choice(rank: int, side: int, convolutions: int) -> None:
    torch.manual_seed(5)
    [block] = use_cpu_forms(nn.Sequential(CPDBlock(64, 8, 3, rank, padding=1)))
    calls: list[nn.Module] = []
    block.pointwise.register_forward_hook(lambda module, *_: calls.append(module))
    x, goal = torch.randn(12, 64, side, side), torch.randn(12, 8, side, side)
    with torch.autocast("cpu", torch.bfloat16):
        assert block.trains_as_one(x) == (convolutions == 1)
        trained = block(x)
    assert len(calls) == (1 if convolutions == 3 else 0)
    parameters = list(block.parameters())
    gradients = torch.autograd.grad((trained.float() * goal).sum(), parameters)
    exact = block.eval()(x)
    for one, other in zip(
        (trained, *gradients), (exact, *torch.autograd.grad((exact * goal).sum(), parameters)), strict=True
    ):
        assert (one.float() - other).norm() < 0.02 * other.norm()
