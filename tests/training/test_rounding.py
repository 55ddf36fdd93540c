"""Training with rounded weights and inputs: the rounding, the layers, a run."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from test_distillation import arguments, losses, trained  # noqa: F401 (a fixture)
from torch import nn
from torch.nn import functional

from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands.train_det import main
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.errors import UserError
from norton_deploy.training.rounding import (
    RoundedBlock,
    RoundedConv2d,
    RoundedLinear,
    round_layers,
    rounded_input,
    rounded_weight,
)


def test_rounding_to_8_bits_is_that_of_a_graph() -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(1, 3, (4, 5, 6, 7)).astype(np.float32)
    scale = (values.max() - values.min()) / 255
    point = round(-values.min() / scale)
    levels = np.clip(np.round(values / scale) + point, 0, 255)
    assert rounded_input(torch.from_numpy(values)).numpy() == pytest.approx((levels - point) * scale, abs=1e-5)
    scales = np.abs(values).max(axis=(1, 2, 3), keepdims=True) / 127
    expected = np.round(values / scales) * scales
    assert rounded_weight(torch.from_numpy(values)).numpy() == pytest.approx(expected, abs=1e-5)
    positive = rounded_input(torch.tensor([3.0, 4.0]))  # zero is one of the levels, whatever the values
    assert positive.tolist() == pytest.approx([191 * 4 / 255, 4.0])
    assert rounded_input(torch.zeros(0, 3)).shape == (0, 3)
    assert not rounded_input(torch.zeros(2, 3)).any()


def test_gradients_pass_as_if_nothing_was_rounded() -> None:
    values = torch.randn(3, 4, requires_grad=True)
    rounded_input(values).sum().backward()
    assert values.grad is not None and torch.equal(values.grad, torch.ones(3, 4))


def test_a_block_computes_its_two_rounded_convolutions() -> None:
    torch.manual_seed(0)
    block = CPDBlock(4, 5, 3, 2, padding=1)
    x = torch.randn(2, 4, 6, 7)
    kernels = torch.einsum("ohr,owr->orhw", *block._factor_views()[:2])
    terms = functional.conv2d(rounded_input(x), rounded_weight(block.pointwise.weight))
    expected = functional.conv2d(rounded_input(terms), rounded_weight(kernels), block.bias, padding=1, groups=5)
    found = RoundedBlock.sharing(block)(x)
    assert torch.equal(found, expected)
    assert 1e-4 < (found - block(x)).abs().max() < 0.2


def test_layers_of_a_detector_but_the_first_and_last(trained: Path) -> None:  # noqa: F811
    detector = load_checkpoint(trained / "small.safetensors").model
    kinds = {name: type(layer) for name, layer in detector.named_modules()}
    rounded = round_layers(copy.deepcopy(detector))
    assert list(rounded.state_dict()) == list(detector.state_dict())
    changed = {name for name, layer in rounded.named_modules() if type(layer) is not kinds[name]}
    inside = {f"{name}.{part}" for name in changed for part in ("pointwise", "horizontal", "vertical")}
    layers = {name for name, kind in kinds.items() if issubclass(kind, nn.Conv2d | nn.Linear | CPDBlock)} - inside
    assert layers - changed == {
        "backbone.body.conv1", "rpn.head.cls_logits", "rpn.head.bbox_pred", "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_predictor.mask_fcn_logits",
    }  # fmt: skip
    kinds_now = {type(layer) for name, layer in rounded.named_modules() if name in changed}
    assert kinds_now == {RoundedBlock, RoundedConv2d, RoundedLinear}


def test_a_run_with_its_own_float_detector_as_teacher(trained: Path, tmp_path: Path) -> None:  # noqa: F811
    small = trained / "small.safetensors"
    more = ["--steps", "2", "--init", str(small), "--teacher", str(small), "--quantise"]
    main(arguments(trained, tmp_path / "run", *more))
    first, _ = losses(tmp_path / "run")
    assert 0 < first["imitation"] < 0.1  # the same detector, rounded
    tuned, before = (load_checkpoint(file) for file in (tmp_path / "run/last.safetensors", small))
    assert tuned.header.plan == before.header.plan
    assert any(not torch.equal(a, b) for a, b in zip(tuned.model.parameters(), before.model.parameters(), strict=True))
    with pytest.raises(UserError, match="quantise: gives the layers forms of its own"):
        main(arguments(trained, tmp_path / "other", *more, "--cpu-forms"))
