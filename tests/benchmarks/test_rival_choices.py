"""The choices that Algorithm 1 is compared with, against their literal definitions."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import Tensor

from benchmarks.lib.rival_choices import choose_at_random, choose_by_geometric_median, choose_by_l1_norm
from norton_deploy.compression.compress import compress, compress_with_kept
from norton_deploy.errors import UserError
from norton_deploy.method.cp import decompose_filters
from norton_deploy.method.filter_selection import choose_by_angles, pabs_distance, select_filters
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings


def filters(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed))


def test_l1_keeps_the_largest_norms() -> None:
    vectors = torch.tensor([[1.0, -1.0], [0.5, 0.0], [-3.0, 0.0], [1.5, -0.5]])  # norms 2, 0.5, 3, 2
    assert choose_by_l1_norm([vectors], 2).tolist() == [0, 2]  # of the two with norm 2 the first
    assert choose_by_l1_norm([vectors, torch.tensor([[0.0], [9.0], [0.0], [0.1]])], 2).tolist() == [1, 2]


@pytest.mark.parametrize("seed", range(3))
def test_fpgm_drops_the_filters_nearest_to_all_others(seed: int) -> None:
    vectors = filters(9, 5, seed)
    rows = vectors.double().tolist()
    sums = [math.fsum(math.dist(row, other) for other in rows) for row in rows]
    for keep in (1, 4, 8):
        expected = sorted(sorted(range(9), key=lambda k: -sums[k])[:keep])
        assert choose_by_geometric_median([vectors], keep).tolist() == expected
    # Coupled layers: the distance of the joined vectors.
    halves = [vectors[:, :2], vectors[:, 2:]]
    assert torch.equal(choose_by_geometric_median(halves, 4), choose_by_geometric_median([vectors], 4))


def test_random_is_seeded_and_all_sets_occur() -> None:
    vectors = filters(4, 3)

    def draw(seed: int) -> tuple[int, ...]:
        return tuple(choose_at_random([vectors], 2, generator=torch.Generator().manual_seed(seed)).tolist())

    assert draw(5) == draw(5)
    assert {draw(seed) for seed in range(80)} == set(itertools.combinations(range(4), 2))


def test_angles_are_algorithm_1_on_the_summed_distances() -> None:
    first, second = decompose_filters(filters(8, 54).view(8, 6, 3, 3), 2), filters(8, 5, seed=1)
    distance = pabs_distance(first, measure="norm") + pabs_distance(second, measure="norm")
    assert torch.equal(choose_by_angles([first, second], 3, measure="norm"), select_filters(distance, 3))


def test_decomposed_filters_count_as_what_their_factors_rebuild() -> None:
    factors = decompose_filters(filters(8, 54).view(8, 6, 3, 3), 2)
    for choose in (choose_by_l1_norm, choose_by_geometric_median):
        assert torch.equal(choose([factors], 3), choose([factors.reconstruct().flatten(1)], 3))


@pytest.mark.parametrize("choose", [choose_by_l1_norm, choose_by_geometric_median, choose_by_angles])
def test_keep_out_of_range_is_an_error(choose) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match="keep=5 filters of 4: choose 1 to 4"):
        choose([filters(4, 3)], 5)


def test_compress_keeps_what_the_choice_says() -> None:
    torch.manual_seed(0)
    dense = ClassifierSettings("resnet18", 10).build().eval()
    plan = CompressionPlan("resnet18", {"layer1.0.conv1": 1}, {"layer1.0.conv1": 5, "layer3": 9})
    kept = compress_with_kept(dense, plan, starts=1, choose=choose_by_l1_norm).kept
    rebuilt = decompose_filters(dense.get_submodule("layer1.0.conv1").weight, 1, starts=1).reconstruct()  # type: ignore[arg-type]
    assert torch.equal(kept["layer1.0.conv1"], rebuilt.abs().sum(dim=(1, 2, 3)).topk(5).indices.sort().values)
    coupled = [f"layer3.{name}.weight" for name in ("0.conv2", "0.downsample.0", "1.conv2")]
    norms = torch.stack([dense.state_dict()[name].abs().sum(dim=(1, 2, 3)) for name in coupled]).sum(dim=0)
    assert torch.equal(kept["layer3"], norms.topk(9).indices.sort().values)
    generator = torch.Generator().manual_seed(1)
    again = compress_with_kept(dense, plan, starts=1, choose=partial(choose_at_random, generator=generator)).kept
    assert not torch.equal(kept["layer3"], again["layer3"])


def test_prune_then_decompose_is_compress_twice() -> None:
    torch.manual_seed(0)
    dense = ClassifierSettings("resnet18", 10).build().eval()
    keep = CompressionPlan("resnet18", {}, {"layer1.0.conv1": 20})
    ranks = CompressionPlan("resnet18", {"layer1.0.conv1": 1, "layer1.0.conv2": 1})
    pruned = compress(dense, keep)
    small = compress(pruned, ranks, starts=1)
    together = compress(dense, CompressionPlan("resnet18", ranks.ranks, keep.keep), starts=1)
    assert {n: t.shape for n, t in small.state_dict().items()} == {n: t.shape for n, t in together.state_dict().items()}
    block = small.get_submodule("layer1.0.conv2")
    found = decompose_filters(pruned.get_submodule("layer1.0.conv2").weight, 1, starts=1)  # type: ignore[arg-type]
    torch.testing.assert_close(block.dense_weight(), found.reconstruct())  # type: ignore[operator]
