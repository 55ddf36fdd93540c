"""Channels by harm: against all subsets of a tiny case, and in a model whose channels repeat each other."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from norton_deploy.compression.calibration import make_probes, run_stages
from norton_deploy.compression.channel_harm import channel_loss, choose_by_harm, greedy_channels
from norton_deploy.compression.compress import compress_with_kept
from norton_deploy.compression.refit import refit
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings

CLASSIFIER = ClassifierSettings("resnet18", 7, image_size=(32, 32))


def loss_of(moments: Tensor, metric: Tensor, kept: tuple[int, ...]) -> float:
    index = list(kept)
    predicted = moments[:, index] @ torch.linalg.solve(moments[index][:, index], moments[index])
    return float((metric * (moments - predicted)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_each_channel_taken_is_the_one_that_lowers_the_loss_most(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    samples, kernels = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    samples = samples @ torch.randn(6, 6, generator=generator, dtype=torch.float64)
    moments, metric = samples.T @ samples, kernels[:4].T @ kernels[:4]
    taken: tuple[int, ...] = ()
    for count in range(1, 5):
        taken = min(
            ((*taken, other) for other in range(6) if other not in taken), key=lambda s: loss_of(moments, metric, s)
        )
        assert greedy_channels(moments, metric, count).tolist() == list(taken)
    best = min(combinations(range(6), 3), key=lambda s: loss_of(moments, metric, s))
    found = tuple(greedy_channels(moments, metric, 3).tolist())
    assert loss_of(moments, metric, found) <= 3 * loss_of(moments, metric, best)
    # the readers' outputs, with the other channels predicted by least squares
    kept = samples[:, list(found)]
    predicted = kept @ torch.linalg.lstsq(kept, samples).solution
    lost = ((samples - predicted) @ kernels[:4].T).square().sum() / (samples @ kernels[:4].T).square().sum()
    assert channel_loss(moments, metric, torch.tensor(found)) == pytest.approx(float(lost), rel=1e-3)
    assert channel_loss(moments, metric, torch.arange(6)) == pytest.approx(0, abs=1e-5)


def test_channels_that_repeat_others_go_and_nothing_is_lost() -> None:
    """Twins under another scale lie at an angle of zero; sums of two others do not, and angles cannot see them."""
    torch.manual_seed(0)
    dense = CLASSIFIER.build().eval()
    conv = dense.get_submodule("layer1.0.conv1")
    with torch.no_grad():  # behind a ReLU only multiples stay dependent
        conv.weight[32:] = torch.rand(32, 1, 1, 1) * conv.weight[torch.randperm(32)]
    plan = CompressionPlan("resnet18", {}, {"layer1.0.conv1": 32})
    pictures = [torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(8)]
    probes = list(make_probes(dense, pictures, CLASSIFIER, batch=4))
    chosen = choose_by_harm(dense, plan, probes)
    assert set(chosen) == {"layer1.0.conv1"}
    found = compress_with_kept(dense, plan, chosen=chosen)
    assert torch.equal(found.kept["layer1.0.conv1"], chosen["layer1.0.conv1"])
    with torch.no_grad():
        wanted = run_stages(dense, probes[0])["logits"]
        refit(found.model, dense, found.kept, probes)
        repaired = run_stages(found.model, probes[0])["logits"]
    assert (repaired - wanted).norm() < 1e-3 * wanted.norm()
