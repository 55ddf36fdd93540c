"""Least-squares recovery: never worse, exact where an exact solution exists."""

import pytest
import torch
from torch import nn

from norton_deploy.compression import refit as refit_module
from norton_deploy.compression.calibration import make_probes, run_stages
from norton_deploy.compression.compress import compress, compress_with_kept
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.normal_equations import NormalEquations, fit_factors
from norton_deploy.compression.refit import input_patches, refit
from norton_deploy.method.cp import CPFactors
from norton_deploy.method.plan import CompressionPlan
from tests.compression.small_models import CLASSIFIER, DETECTOR, pictures

pytestmark = pytest.mark.usefixtures("narrow_resnets")


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return CLASSIFIER.build().eval()


@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 1, 1), (2, 1, 1), ((2, 1), (0, 2), (1, 2))])
def test_patches_times_weights_are_the_convolution(stride: int, padding: int, dilation: int) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 3), stride=stride, padding=padding, dilation=dilation)
    x = torch.rand(2, 3, 9, 8)
    output = conv(x)
    positions = torch.randperm(output[:, 0].numel())
    expected = output.flatten(2).transpose(1, 2).flatten(0, 1)[positions]
    actual = input_patches(conv, x, positions) @ conv.weight.flatten(1).T + conv.bias
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_normal_equations_give_the_errors_and_the_solution_of_least_squares() -> None:
    torch.manual_seed(0)
    inputs, outputs = torch.randn(50, 6), torch.randn(50, 4)
    equations = NormalEquations.empty(6, 4)
    equations.add(inputs[:20], outputs[:20])
    equations.add(inputs[20:], outputs[20:])
    weight, bias = torch.randn(4, 6), torch.randn(4)
    expected = (inputs @ weight.T + bias - outputs).double().square().sum(dim=0)
    torch.testing.assert_close(equations.squared_error(weight, bias), expected, rtol=1e-5, atol=1e-5)
    with_ones = torch.cat([inputs, torch.ones(50, 1)], dim=1).double()
    solution = torch.linalg.lstsq(with_ones, outputs.double()).solution
    fitted = equations.centred().fit(weight)
    torch.testing.assert_close(fitted, solution[:-1].T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(equations.bias(fitted), solution[-1], rtol=1e-5, atol=1e-6)


def test_equations_of_some_outputs_give_their_errors() -> None:
    torch.manual_seed(0)
    equations = NormalEquations.empty(6, 4)
    equations.add(torch.randn(50, 6), torch.randn(50, 4))
    weight, bias, index = torch.randn(4, 6), torch.randn(4), torch.tensor([3, 1])
    some = equations.of_outputs(index)
    torch.testing.assert_close(
        some.squared_error(weight[index], bias[index]), equations.squared_error(weight, bias)[index]
    )
    torch.testing.assert_close(some.bias(weight[index]), equations.bias(weight)[index])


def test_channel_factor_is_the_least_squares_solution() -> None:
    """Against lstsq on the explicit outputs of the block, filter by filter."""
    torch.manual_seed(0)
    factors = CPFactors(torch.randn(3, 3, 2), torch.randn(3, 3, 2), torch.randn(3, 4, 2))
    patches, wanted = torch.randn(200, 4 * 9), torch.randn(200, 3)
    equations = NormalEquations.empty(36, 3)
    equations.add(patches, wanted)
    fitted = fit_factors(equations, factors, sweeps=0)
    kernels = torch.einsum("ohr,owr->orhw", factors.A, factors.B)
    design = torch.einsum("pihw,orhw->opir", patches.view(200, 4, 3, 3), kernels).flatten(2)
    solution = torch.linalg.lstsq(design.double(), wanted.T[..., None].double()).solution
    torch.testing.assert_close(fitted.C.flatten(1).double(), solution[..., 0], rtol=1e-4, atol=1e-5)
    more = fit_factors(equations, factors, sweeps=3)
    errors = [equations.squared_error(found.reconstruct().flatten(1)).sum() for found in (factors, fitted, more)]
    assert errors[0] > errors[1] > errors[2]


def test_a_full_rank_unpruned_model_stays_exact() -> None:
    dense = classifier()
    small = compress(dense, CompressionPlan("resnet18", {"layer1.0.conv1": 9, "layer3.1.conv2": 9}))
    probes = list(make_probes(dense, pictures(4, 32), CLASSIFIER))
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    results = refit(small, dense, {}, probes)
    assert all(result.error_after == 0 for result in results)
    for name, tensor in small.state_dict().items():
        torch.testing.assert_close(tensor, before[name], atol=0, rtol=0)


def test_linearly_dependent_channels_are_repaired_exactly() -> None:
    """Half the filters are multiples of the others: cutting them loses nothing that the next layer cannot restore."""
    dense = classifier()
    with torch.no_grad():
        block = dense.layer1[0]
        block.conv1.weight[8:] = 2.5 * block.conv1.weight[:8]
    compressed = compress_with_kept(dense, CompressionPlan("resnet18", {}, {"layer1.0.conv1": 8}))
    small, kept = compressed.model, compressed.kept
    probes = list(make_probes(dense, pictures(8, 32), CLASSIFIER))
    with torch.no_grad():
        wanted = run_stages(dense, probes[0])["logits"]
        broken = run_stages(small, probes[0])["logits"]
        refit(small, dense, kept, probes)
        repaired = run_stages(small, probes[0])["logits"]
    assert (broken - wanted).norm() > 1e-2 * wanted.norm()
    assert (repaired - wanted).norm() < 1e-4 * wanted.norm()


def test_no_layer_gets_worse_and_the_detector_gets_better() -> None:
    torch.manual_seed(0)
    dense = DETECTOR.build("mask")
    with torch.no_grad():  # BatchNorm of its own.
        dense.backbone(torch.rand(4, 3, 64, 64))
    dense.eval()
    body, heads = "backbone.body.", "roi_heads."
    plan = CompressionPlan(
        "rcnn",
        {f"{body}layer1.0.conv1": 1, f"{body}layer2.1.conv2": 2, "backbone.fpn.layer_blocks.0.0": 1,
         "rpn.head.conv.0.0": 1, f"{heads}mask_head.0.0": 1},
        {f"{body}layer2.0.conv1": 24, f"{body}layer3": 50, "backbone.fpn.inner_blocks": 12,
         "backbone.fpn.layer_blocks": 12, f"{heads}box_head.fc6": 24, f"{heads}mask_head.0.0": 12},
    )  # fmt: skip
    compressed = compress_with_kept(dense, plan, starts=1)
    small, kept = compressed.model, compressed.kept
    probes = list(make_probes(dense, pictures(4, 64), DETECTOR, batch=2))
    names = ("rpn_logits.0", "class_logits", "masks")

    def errors() -> list[float]:
        with torch.no_grad():
            wanted, found = run_stages(dense, probes[0]), run_stages(small, probes[0])
        return [float((found[name] - wanted[name]).square().sum() / wanted[name].square().sum()) for name in names]

    before = errors()
    results = refit(small, dense, kept, probes, samples=10**6)
    after = errors()
    assert isinstance(small.get_submodule("rpn.head.conv.0.0"), CPDBlock)
    assert {"backbone.body.conv1", "roi_heads.box_head.fc6", "rpn.head.cls_logits"} <= {r.name for r in results}
    assert all(result.error_after <= result.error_before for result in results)
    assert all(new < 0.7 * old for old, new in zip(before, after, strict=True)), (before, after)


def test_an_interrupted_refit_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = classifier()
    small = compress(dense, CompressionPlan("resnet18", {"layer1.0.conv1": 1}), starts=1)
    probes = list(make_probes(dense, pictures(2, 32), CLASSIFIER, batch=2))

    def interrupted(*_given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(refit_module, "input_patches", interrupted)
    with pytest.raises(KeyboardInterrupt):
        refit(small, dense, {}, probes)
    for module in (*small.modules(), *dense.modules()):
        assert not module._forward_hooks and not module._forward_pre_hooks
