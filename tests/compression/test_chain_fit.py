"""Factors from second moments: exact where that exists, closed forms, never worse; passes that begin late."""

import pytest
import torch
from torch import Tensor, nn

from norton_deploy.compression.calibration import make_probes, run_stages
from norton_deploy.compression.chain_fit import ChainKernels, fit_chain
from norton_deploy.compression.compress import compress_with_kept
from norton_deploy.compression.factored_conv import FactoredConv
from norton_deploy.compression.frontier import Frontier
from norton_deploy.compression.normal_equations import NormalEquations
from norton_deploy.compression.refit import refit
from norton_deploy.method.coupled import decompose_coupled
from norton_deploy.method.layer_factors import decompose_layer
from norton_deploy.method.plan import CompressionPlan, Coupling
from tests.compression.small_models import CLASSIFIER, DETECTOR, pictures


def equations_of(weight: Tensor, samples: int = 400) -> NormalEquations:
    """Correlated inputs, and the outputs that `weight` [O, F] makes of them."""
    features = weight.shape[1]
    inputs = torch.randn(samples, features) @ torch.randn(features, features) * torch.logspace(0, -1, features)
    equations = NormalEquations.empty(features, len(weight))
    equations.add(inputs, inputs @ weight.mT)
    return equations


def chains(conv: nn.Conv2d) -> dict[str, FactoredConv]:
    weight = conv.weight.detach()
    cluster = torch.arange(2).repeat_interleave(conv.out_channels // 2)
    factors = {
        "coupled": decompose_coupled(weight, 3, 2, cluster=cluster),
        "tucker": decompose_layer(weight, "tucker2", (5, 3)),
        "layer_cp": decompose_layer(weight, "reshaped", (6,)),
    }
    return {name: FactoredConv.from_factors(found, conv) for name, found in factors.items()}  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["coupled", "tucker", "layer_cp"])
def test_the_fit_is_better_than_the_weights_own_factors_and_finds_what_is_exact(form: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3)
    present = ChainKernels.of(chains(conv)[form])
    weight = conv.weight.detach().flatten(1)
    equations = equations_of(weight)
    before = float(equations.squared_error(present.weight().flatten(1)).sum())
    errors = [
        float(
            equations.squared_error(fit_chain(equations.with_prior(weight, 1e-8), present, n).weight().flatten(1)).sum()
        )
        for n in (0, 2, 6)
    ]
    assert before > 1.2 * errors[0] and errors[0] >= errors[1] >= errors[2]
    exact = present.weight().flatten(1).float()  # a layer that has the form already
    again = equations_of(exact)
    found = fit_chain(again.with_prior(exact, 1e-10), present, 2).weight().flatten(1)
    assert float(again.squared_error(found).sum()) < 1e-6 * float(again.energy.sum())


def test_with_the_entry_whole_tucker_is_the_reduced_rank_regression() -> None:
    """Against the eigenvectors of the best outputs' moments, on the explicit samples."""
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3)
    present = ChainKernels.of(FactoredConv.from_factors(decompose_layer(conv.weight, "tucker2", (3, 4)), conv))  # type: ignore[arg-type]
    inputs, outputs = torch.randn(500, 36).double(), torch.randn(500, 8).double()
    equations = NormalEquations.empty(36, 8)
    equations.add(inputs, outputs)
    best = torch.linalg.lstsq(inputs, outputs).solution
    vectors = torch.linalg.svd(inputs @ best, full_matrices=False).Vh[:3].mT
    expected = float((outputs - inputs @ best @ vectors @ vectors.mT).square().sum())
    found = fit_chain(equations.with_prior(torch.zeros(8, 36), 1e-12), present, 0)
    assert float(equations.squared_error(found.weight().flatten(1)).sum()) == pytest.approx(expected, rel=1e-6)


def test_a_strong_pull_gives_the_factors_of_the_bare_weight() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 10, 3)
    weight = conv.weight.detach().flatten(1)
    for form in ("coupled", "tucker"):
        chain = chains(conv)[form]
        found = fit_chain(equations_of(weight).with_prior(weight, 1e8), ChainKernels.of(chain), 3)
        errors = [
            float((w.flatten(1) - weight).square().sum())
            for w in (chain.dense_weight().detach(), found.weight().float())
        ]
        assert errors[1] == pytest.approx(errors[0], rel=0.02)


@pytest.mark.usefixtures("narrow_resnets")
def test_every_layer_of_every_form_gets_better_and_so_does_the_detector() -> None:
    torch.manual_seed(0)
    dense = DETECTOR.build("mask")
    with torch.no_grad():  # BatchNorm of its own.
        dense.backbone(torch.rand(4, 3, 64, 64))
    dense.eval()
    body, heads = "backbone.body.", "roi_heads."
    plan = CompressionPlan(
        "rcnn",
        {f"{body}layer2.1.conv2": 1},
        {f"{body}layer2.0.conv1": 24, "backbone.fpn.layer_blocks": 12, f"{heads}mask_head.0.0": 12},
        coupled={f"{body}layer1.0.conv1": Coupling(8, 4)},
        tucker={f"{body}layer2.0.conv1": (8, 8), "rpn.head.conv.0.0": (6, 6)},
        layer_cp={f"{heads}mask_head.0.0": 12},
    )
    found = compress_with_kept(dense, plan, starts=1)
    probes = list(make_probes(dense, pictures(4, 64), DETECTOR, batch=2))

    def errors() -> list[float]:
        with torch.no_grad():
            wanted, given = run_stages(dense, probes[0]), run_stages(found.model, probes[0])
        names = ("rpn_logits.0", "class_logits", "masks")
        return [float((given[name] - wanted[name]).square().sum() / wanted[name].square().sum()) for name in names]

    before, told = errors(), []
    results = refit(found.model, dense, found.kept, probes, progress=lambda name, layers: told.append((name, layers)))
    assert all(new < 0.7 * old for old, new in zip(before, errors(), strict=True)), before
    assert all(result.error_after <= result.error_before for result in results)
    assert {name for name, _ in told[len(probes) :]} == {result.name for result in results}
    assert len(told) == told[0][1] == len(probes) + len(results)


@pytest.mark.parametrize("task", ["cls", "mask"])
def test_passes_that_begin_late_read_the_same_inputs(task: str) -> None:
    torch.manual_seed(0)
    settings = CLASSIFIER if task == "cls" else DETECTOR
    model = (CLASSIFIER.build() if task == "cls" else DETECTOR.build("mask")).eval()
    probes = list(make_probes(model, pictures(4, 64), settings, batch=2))
    with torch.no_grad():
        plain = [run_stages(model, probe) for probe in probes]
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    calls: list[str] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _m, _i, n=name: calls.append(n)) for name in layers
    ]

    @torch.no_grad()
    def outputs() -> list[dict[str, Tensor]]:
        found = []
        for frontier.probe, probe in enumerate(probes):
            found.append(run_stages(model, probe))
        return found

    with Frontier(model) as frontier:
        done: list[str] = []
        for name in layers:  # in the order of the data, but for downsampling
            done.append(name)
            if ".downsample." in name or name.endswith("conv2") or name.startswith(("roi_heads.", "fc")):
                frontier.advance([n for n in layers if n not in done], lambda: outputs() and None)
                calls.clear()
                for wanted, given in zip(plain, outputs(), strict=True):
                    for key in given:
                        torch.testing.assert_close(given[key], wanted[key], rtol=1e-5, atol=1e-5)
    assert len(calls) < len(layers)  # the last passes began behind the body
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(module) for module in model.modules())
