"""The chains compute the convolution with the recomposed weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.lib.rival_layers import chain, chain_macs, map_sizes, replace_by_rivals, rival_sequence
from norton_deploy.errors import UserError
from norton_deploy.method.layer_factors import LAYER_FORMS, LayerForm, decompose_layer

GEOMETRIES = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
    {"kernel_size": (3, 5), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"kernel_size": (1, 3), "stride": (1, 2), "dilation": (1, 2)},
    {"kernel_size": (4, 3), "padding": "same"},
    {"kernel_size": 3, "padding": "valid"},
)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("kind", LAYER_FORMS)
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_the_chain_equals_the_recomposed_convolution(kind: LayerForm, geometry: dict) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, **geometry).double()
    factors = decompose_layer(conv.weight, kind, (4, 3) if kind == "tucker2" else (5,))
    sequence = rival_sequence(factors, conv)
    images = torch.randn(2, 6, 11, 12, dtype=torch.float64)
    dense = nn.Conv2d(6, 8, **geometry).double()
    dense.load_state_dict({**conv.state_dict(), "weight": factors.reconstruct().double()})
    torch.testing.assert_close(sequence(images), dense(images), rtol=1e-5, atol=1e-5)
    if geometry.get("padding") != "valid":
        return
    expected = functional.conv2d(images, factors.reconstruct().double(), conv.bias)
    torch.testing.assert_close(sequence(images), expected, rtol=1e-5, atol=1e-5)


def test_macs_of_a_chain_are_those_of_its_convolutions() -> None:
    conv = nn.Conv2d(6, 8, 3, stride=2, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), conv)
    sizes = map_sizes(model, ["1"], (10, 14))
    assert sizes == {"1": ((10, 14), (5, 7))}
    for kind in LAYER_FORMS:
        ranks = (4, 3) if kind == "tucker2" else (5,)
        small = replace_by_rivals(model, {"1": decompose_layer(conv.weight, kind, ranks)})
        assert isinstance(model[1], nn.Conv2d) and isinstance(small.get_submodule("1"), nn.Sequential)
        counted = 0

        def count(layer: nn.Conv2d, _inputs: object, output: torch.Tensor) -> None:
            nonlocal counted
            counted += output.numel() * layer.weight[0].numel()

        for layer in small.get_submodule("1").children():
            layer.register_forward_hook(count)
        small(torch.zeros(1, 3, 10, 14))
        assert counted == chain_macs(chain(kind, 8, 6, ranks), (3, 3), (10, 14), (5, 7))


def test_what_cannot_be_factorised_is_refused() -> None:
    factors = decompose_layer(torch.randn(8, 4, 3, 3), "layer", (2,))
    with pytest.raises(UserError, match="zero padding"):
        rival_sequence(factors, nn.Conv2d(4, 8, 3, padding=1, padding_mode="reflect"))
    with pytest.raises(UserError, match="expected a convolution"):
        replace_by_rivals(nn.Sequential(nn.Linear(2, 2)), {"0": factors})
