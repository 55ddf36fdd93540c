"""Training on resident images: the optimiser, the schedule, the GPU's forms, and a small training on a CPU."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from benchmarks.lib.resident_training import (
    NesterovSGD,
    ResidentSettings,
    learning_rate,
    train_resident,
    use_gpu_forms,
)
from benchmarks.lib.rival_choices import choose_living_by_angles
from norton_deploy.compression.compress import compress
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.data.resident_images import ResidentImages
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings

PLAN = CompressionPlan("vgg16_bn", {"features.0": 1, "features.3": 2}, {"features.0": 24, "classifier.0": 100})


@pytest.fixture(scope="module")
def vgg() -> nn.Module:
    """With statistics and biases that are not those of the initialisation."""
    torch.manual_seed(0)
    model = ClassifierSettings("vgg16_bn", num_classes=10, image_size=(32, 32)).build().eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
        elif isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.uniform_(layer.bias, -0.1, 0.1)
    return model


@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_the_optimiser_is_nesterovs_with_clipping(clip_norm: float) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    reference = copy.deepcopy(model)
    optimizer = NesterovSGD(model, ResidentSettings(clip_norm=clip_norm, weight_decay=0.1))
    groups = [
        {"params": [part for part in reference.parameters() if part.ndim > 1], "weight_decay": 0.1},
        {"params": [part for part in reference.parameters() if part.ndim == 1]},
    ]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    for lr in (0.1, 0.3, 0.2, 0.05):
        images, labels = torch.randn(16, 4, dtype=torch.float64), torch.randint(0, 3, (16,))
        optimizer.lr.fill_(lr)
        optimizer.step(torch.autograd.grad(functional.cross_entropy(model(images), labels), optimizer.parameters))
        for group in sgd.param_groups:
            group["lr"] = lr
        sgd.zero_grad()
        functional.cross_entropy(reference(images), labels).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
        sgd.step()
    for found, expected in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_factors_are_spared_decay_where_they_should_be(vgg: nn.Module) -> None:
    small = use_gpu_forms(compress(vgg, CompressionPlan("vgg16_bn", {"features.0": 1}), starts=1))
    factor, dense = small.get_submodule("features.0.pointwise").weight, small.get_submodule("features.3").weight
    before = factor.detach().clone(), dense.detach().clone()
    optimizer = NesterovSGD(small, ResidentSettings(weight_decay=0.1, factor_decay=False))
    optimizer.lr.fill_(0.1)
    optimizer.step(tuple(torch.zeros_like(parameter) for parameter in optimizer.parameters))
    assert torch.equal(factor, before[0]) and not torch.equal(dense, before[1])


def test_the_learning_rate_rises_in_a_line_and_falls_along_half_a_cosine() -> None:
    settings = ResidentSettings(lr=0.2, warmup_epochs=2)
    rates = [learning_rate(settings, epoch, 10) for epoch in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0.02, 0.11, 0.2, 0.1, 0.0])
    assert learning_rate(settings, 0, 1) == pytest.approx(0.2)  # no warm-up in a single epoch


def test_gpu_forms_compute_the_same_and_keep_the_parameters_names(vgg: nn.Module) -> None:
    small = compress(vgg, PLAN)
    fast = use_gpu_forms(copy.deepcopy(small))
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(fast(images), small(images), rtol=1e-3, atol=1e-4)
    missing = small.state_dict().keys() - fast.state_dict().keys()
    assert {name.rpartition(".")[2] for name in missing} == {"bias"} and len(missing) == 14
    assert fast.state_dict().keys() < small.state_dict().keys()
    # in training the statistics are those of the batch: the biases change nothing
    slow, fast = copy.deepcopy(small).train(), use_gpu_forms(copy.deepcopy(small)).train()
    torch.testing.assert_close(fast(images), slow(images), rtol=1e-2, atol=1e-2)


def test_pruning_a_decomposed_model_is_what_compress_does_in_one_go(vgg: nn.Module) -> None:
    decomposed = compress(vgg, CompressionPlan("vgg16_bn", PLAN.ranks))
    prune_only = CompressionPlan("vgg16_bn", keep=PLAN.keep)
    expected, found = compress(vgg, PLAN), compress(decomposed, prune_only)
    for (name, part), (_, other) in zip(expected.named_parameters(), found.named_parameters(), strict=True):
        assert torch.equal(part, other), name
    fast = compress(use_gpu_forms(copy.deepcopy(decomposed)), prune_only)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(fast(images), expected(images), rtol=1e-3, atol=1e-4)
    assert isinstance(decomposed.get_submodule("features.0"), CPDBlock)
    assert decomposed.get_submodule("features.0").out_channels == 64  # untouched


def test_pruning_after_fine_tuning_keeps_no_filter_that_was_switched_off(vgg: nn.Module) -> None:
    tuned = use_gpu_forms(compress(vgg, CompressionPlan("vgg16_bn", {"features.0": 1}), starts=1))
    block, norm = tuned.get_submodule("features.0"), tuned.get_submodule("features.1")
    assert isinstance(block, CPDBlock) and isinstance(norm, nn.BatchNorm2d)
    off = torch.arange(64) % 8 > 2
    with torch.no_grad():
        for part in (block.pointwise, block.horizontal, block.vertical):
            part.weight[off] *= 0.01  # as weight decay does
        norm.bias.copy_(torch.arange(64.0))
    plan = CompressionPlan("vgg16_bn", keep={"features.0": 24})
    small = compress(tuned, plan, choose=choose_living_by_angles).get_submodule("features.1")
    assert isinstance(small, nn.BatchNorm2d)
    assert torch.equal(small.bias, torch.arange(64.0)[~off])


def coloured_images(count: int) -> ResidentImages:
    """Class 0 is reddish, class 1 bluish."""
    pixels = torch.randint(0, 100, (count, 8, 8, 3), dtype=torch.uint8)
    labels = torch.arange(count) % 2
    pixels[labels == 0, ..., 0] += 100
    pixels[labels == 1, ..., 2] += 100
    colours = torch.full((3,), 0.3), torch.full((3,), 0.2)
    return ResidentImages(pixels, labels, ("red", "blue"), range(count), *colours)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )


def test_it_learns_counts_and_is_reproducible() -> None:
    settings = ResidentSettings(batch_size=16, lr=0.1, warmup_epochs=1, epochs=4)
    seen = []

    def teacher(epoch: int, pixels: torch.Tensor) -> torch.Tensor:
        seen.append((epoch, len(pixels)))
        return torch.zeros(len(pixels), 2)

    def loss(logits: torch.Tensor, labels: torch.Tensor, scores: torch.Tensor | None) -> torch.Tensor:
        assert scores is not None and scores.shape == (16, 2)
        return functional.cross_entropy(logits, labels)

    images, held_out, models = coloured_images(70), coloured_images(30), [small_network(), small_network()]
    for model in models:
        seen.clear()
        done = train_resident(model, images, held_out, loss, settings, seed=0, seconds=math.inf, teacher=teacher)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
    assert done["epochs"] == 4 and done["images_seen"] == 4 * 80 and not done["recorded"]
    assert len(done["top1_each_epoch"]) == 4 and done["top1_each_epoch"][-1] == 1.0
    assert seen == [(0, 80), (1, 80), (2, 80), (3, 80)]


def test_the_time_decides_the_epochs_but_the_warm_up_is_kept() -> None:
    settings = ResidentSettings(batch_size=16, warmup_epochs=3, epochs=50)
    images = coloured_images(32)
    done = train_resident(
        small_network(),
        images,
        images,
        lambda x, y, _: functional.cross_entropy(x, y),
        settings,
        seed=0,
        seconds=0.0,
    )
    assert done["epochs"] == 4


def test_a_loss_that_is_not_finite_ends_it() -> None:
    images = coloured_images(32)
    with pytest.raises(FloatingPointError, match="epoch 0"):
        train_resident(
            small_network(),
            images,
            images,
            lambda x, y, _: x.sum() * math.nan,
            ResidentSettings(),
            seed=0,
            seconds=1.0,
        )
