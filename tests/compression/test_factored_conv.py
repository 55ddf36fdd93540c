"""FactoredConv: the weight it stands for, in every geometry; in whole models: permutations, cuts, lowering, counts."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from norton_deploy.checkpoints.checkpoint import CheckpointHeader, load_checkpoint, save_checkpoint
from norton_deploy.compression.channel_groups import channel_groups
from norton_deploy.compression.compress import apply_structure, compress, compress_with_kept
from norton_deploy.compression.factored_conv import ChainShape, FactoredConv
from norton_deploy.compression.lowering import lower_model
from norton_deploy.cost.complexity import count_complexity, layer_calls
from norton_deploy.errors import UserError
from norton_deploy.method.coupled import decompose_coupled
from norton_deploy.method.layer_factors import decompose_layer
from norton_deploy.method.plan import CompressionPlan, Coupling
from norton_deploy.search.layer_timing import layer_graph
from norton_deploy.structures import Categories
from tests.compression.small_models import CLASSIFIER, DETECTOR

PLAN = CompressionPlan(
    "resnet18",
    {"layer1.1.conv1": 1},
    {"layer1.0.conv1": 48, "layer2.0.conv1": 96, "layer2": 96},
    coupled={"layer1.0.conv1": Coupling(8, 4), "layer2.0.conv2": Coupling(16, 4), "layer2.1.conv2": Coupling(8, 4)},
    tucker={"layer2.0.conv1": (24, 32)},
    layer_cp={"layer1.1.conv2": 40},
)


def chains(conv: nn.Conv2d) -> list[FactoredConv]:
    """One chain of each form; the filters of the first are sorted."""
    cluster = torch.arange(2).repeat_interleave(conv.out_channels // 2)
    return [
        FactoredConv.from_factors(decompose_coupled(conv.weight, 2, 2, cluster=cluster), conv),
        FactoredConv.from_factors(decompose_layer(conv.weight, "tucker2", (4, 3)), conv),  # type: ignore[arg-type]
        FactoredConv.from_factors(decompose_layer(conv.weight, "reshaped", (5,)), conv),  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "bias"),
    [
        ((3, 3), 1, 1, 1, True),
        ((3, 3), 2, 1, 1, False),
        ((1, 3), (1, 2), (0, 1), 1, True),
        ((3, 2), 1, "same", 2, True),
    ],
)
def test_a_chain_is_the_convolution_with_its_dense_weight(kernel, stride, padding, dilation, bias) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias).double().eval()
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64)
    for chain in chains(conv):
        expected = nn.functional.conv2d(x, chain.dense_weight(), conv.bias, stride, padding, dilation)
        torch.testing.assert_close(chain(x), expected)
        assert not chain.training and chain.in_channels == 6 and chain.out_channels == 8


def test_filters_and_inputs_are_selected() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 8, 3)
    inputs = torch.tensor([5, 0, 2])
    for chain in chains(conv):
        filters = torch.tensor([0, 3, 4, 6])
        small = chain.select_filters(filters).select_inputs(inputs)
        torch.testing.assert_close(small.dense_weight(), chain.dense_weight()[filters][:, inputs])
        assert chain.bias is not None and small.bias is not None
        torch.testing.assert_close(small.bias, chain.bias[filters])
        if chain.exit is None:
            for wrong in ([0, 1, 2, 4], [4, 6, 0, 3], [0, 4, 6]):
                with pytest.raises(ValueError, match="not equally many"):
                    chain.select_filters(torch.tensor(wrong))


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return CLASSIFIER.build().eval()


def test_exact_factors_leave_the_function_whatever_the_clusters() -> None:
    """Clusters permute channels in producers, normalisations and readers, also along a residual stream."""
    dense = classifier()
    with torch.no_grad():
        for layer in dense.modules():
            if isinstance(layer, nn.BatchNorm2d):  # channels that differ, so that a wrong order shows
                layer.weight.uniform_(0.5, 1.5), layer.running_mean.normal_(), layer.running_var.uniform_(0.5, 1.5)
    plan = CompressionPlan(
        "resnet18",
        coupled={
            "layer1.0.conv1": Coupling(64, 4),
            "layer2.0.conv2": Coupling(128, 8),
            "layer2.1.conv2": Coupling(128, 8),
        },
        tucker={"layer2.0.conv1": (64, 128)},
    )
    small = compress_with_kept(dense, plan)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(small.model(x), dense(x), rtol=1e-3, atol=1e-4)
    assert set(small.kept) == {"layer1.0.conv1", "layer2"}
    assert sorted(small.kept["layer2"].tolist()) == list(range(128)) != small.kept["layer2"].tolist()


def test_pruning_keeps_clusters_equal_and_says_which_channels_are_left() -> None:
    dense = classifier()
    torch.nn.init.uniform_(dense.get_submodule("layer1.0.bn1").weight)
    found = compress_with_kept(dense, PLAN, starts=1)
    assert {name: len(kept) for name, kept in found.kept.items()} == {
        "layer1.0.conv1": 48, "layer2.0.conv1": 96, "layer2": 96,
    }  # fmt: skip
    norm = found.model.get_submodule("layer1.0.bn1")
    torch.testing.assert_close(
        norm.running_var, dense.get_submodule("layer1.0.bn1").running_var[found.kept["layer1.0.conv1"]]
    )
    assert found.model(torch.rand(1, 3, 32, 32)).shape == (1, 7)


def test_lowered_is_the_same_function_and_has_only_ordinary_convolutions() -> None:
    model = compress(classifier(), PLAN, starts=1).eval()
    x = torch.rand(2, 3, 32, 32)
    lowered = lower_model(model)
    torch.testing.assert_close(lowered(x), model(x), rtol=1e-3, atol=1e-4)
    assert not any(isinstance(layer, FactoredConv | nn.BatchNorm2d) for layer in lowered.modules())


def test_macs_and_parameters_are_the_closed_forms() -> None:
    for shape, numbers in (
        (ChainShape(8, 12, 4, has_exit=False), 6 * 8 + 12 * 2 * 9),
        (ChainShape(4, 5), 6 * 4 + 5 * 4 * 9 + 5 * 12),
        (ChainShape(7, 7, 7), 6 * 7 + 7 * 9 + 7 * 12),
    ):
        chain = FactoredConv.shaped_like(nn.Conv2d(6, 12, 3, padding=1), shape, 6, 12)
        model = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), chain)
        count = count_complexity(model, (10, 10))
        assert (count.macs, count.params) == (100 * (18 + numbers), 18 + numbers + 12)
        calls = layer_calls(model, (10, 10))
        assert sum(call.shape.macs for call in calls) == count.macs
        assert sum(call.shape.params for call in calls) == count.params - 12
        for call in calls:  # as the timer builds them
            layer_graph(call.shape, "dense")


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    model = compress(classifier(), PLAN, starts=1).eval()
    header = CheckpointHeader(
        "cls", CLASSIFIER, PLAN, Categories(tuple(range(1, 8)), tuple(range(1, 8)), tuple("abcdefg"))
    )
    save_checkpoint(tmp_path / "small.safetensors", model, header)
    loaded = load_checkpoint(tmp_path / "small.safetensors")
    x = torch.rand(1, 3, 32, 32)
    assert loaded.header.plan == PLAN
    torch.testing.assert_close(loaded.model.eval()(x), model(x), rtol=0, atol=0)


def test_a_detector_keeps_its_groups() -> None:
    torch.manual_seed(0)
    heads = "roi_heads."
    plan = CompressionPlan(
        "rcnn",
        keep={"backbone.fpn.layer_blocks": 12, f"{heads}mask_head.0.0": 12},
        coupled={f"backbone.fpn.layer_blocks.{level}.0": Coupling(4, 2) for level in range(4)},
        tucker={f"{heads}mask_head.0.0": (8, 8), "rpn.head.conv.0.0": (8, 8)},
    )
    dense = DETECTOR.build("mask").eval()
    small = compress(dense, plan).eval()
    names = set(channel_groups(dense))
    assert set(channel_groups(small)) == names
    outputs = small([torch.rand(3, 64, 64)])
    assert set(outputs[0]) == {"boxes", "labels", "scores", "masks"}
    shaped = apply_structure(DETECTOR.build("mask"), plan)
    assert {n: t.shape for n, t in shaped.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (CompressionPlan("resnet18", coupled={"layer1.0.conv1": Coupling(8, 5)}), "conv1': 64 filters in 5 clusters"),
        (CompressionPlan("resnet18", tucker={"layer1.0.conv1": (65, 8)}), "rank 65 is above its 64 channels"),
        (CompressionPlan("resnet18", layer_cp={"layer1.0.conv1": 577}), "rank 577 is more than"),
        (CompressionPlan("resnet18", tucker={"layer1.0.conv9": (8, 8)}), "tucker: unknown layer 'layer1.0.conv9'"),
        (
            CompressionPlan("resnet18", {}, {"layer1.0.conv1": 30}, coupled={"layer1.0.conv1": Coupling(8, 4)}),
            "'layer1.0.conv1': 30 filters in 4 equal clusters",
        ),
        (
            CompressionPlan(
                "resnet18", coupled={"layer2.0.conv2": Coupling(8, 4), "layer2.1.conv2": Coupling(8, 8)}
            ),
            r"'layer2' write the same channels and need equally many clusters, found \[4, 8\]",
        ),
    ],
)  # fmt: skip
def test_a_form_that_does_not_fit_names_the_layer(plan: CompressionPlan, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compress(classifier(), plan)


def grad_of(model: nn.Module, x: Tensor) -> Tensor:
    model(x).square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_the_training_forms_leave_it_alone() -> None:
    from norton_deploy.training.forms import recompose_blocks, use_cpu_forms

    x = torch.rand(2, 3, 32, 32)
    wanted = grad_of(compress(classifier(), PLAN, starts=1), x)
    for form in (use_cpu_forms, recompose_blocks):
        torch.testing.assert_close(
            grad_of(form(compress(classifier(), PLAN, starts=1)), x), wanted, rtol=1e-3, atol=1e-2
        )
