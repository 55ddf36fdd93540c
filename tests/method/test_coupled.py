"""Coupled factors against the SVD, eq. 2's factors, and all partitions of a tiny layer."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.coupled import cluster_filters, decompose_coupled
from norton_deploy.method.cp import decompose_filters, layer_nmse, nmse


def weight_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut_energy(filters: Tensor, rank: int) -> float:
    """Squared error of the truncated SVD of the channel unfolding of filters [O, I, Kh, Kw]."""
    unfolded = filters.movedim(1, 0).flatten(1)
    return float(torch.linalg.svdvals(unfolded)[rank:].square().sum())


def test_one_cluster_is_the_truncated_svd() -> None:
    weight = weight_of(6, 8, 3, 3)
    for rank in (1, 3, 8):
        expected = cut_energy(weight, rank) / float(weight.square().sum())
        assert layer_nmse(weight, decompose_coupled(weight, rank, 1)) == pytest.approx(expected, abs=1e-12)


def test_a_cluster_a_filter_loses_what_eq_2_loses_where_kernels_are_rows_and_never_more() -> None:
    rows = weight_of(6, 8, 1, 3)  # a row has rank one, so a free kernel is no more than A outer B
    for rank in (1, 2):
        coupled, cp = decompose_coupled(rows, rank, 6), decompose_filters(rows, rank, max_iterations=500, tolerance=0)
        torch.testing.assert_close(nmse(rows, coupled), nmse(rows, cp), rtol=1e-4, atol=1e-9)
    square = weight_of(6, 8, 3, 3)
    for rank in (1, 2, 4):
        free, cp = decompose_coupled(square, rank, 6), decompose_filters(square, rank)
        assert bool((nmse(square, free) <= nmse(square, cp)).all())
        each = torch.tensor([cut_energy(one[None], rank) / float(one.square().sum()) for one in square])
        torch.testing.assert_close(nmse(square, free), each.double(), rtol=1e-5, atol=1e-9)


def test_the_error_falls_with_rank_and_with_the_number_of_clusters() -> None:
    weight = weight_of(24, 16, 3, 3)
    by_rank = [layer_nmse(weight, decompose_coupled(weight, rank, 4)) for rank in (1, 2, 4, 8)]
    by_clusters = [layer_nmse(weight, decompose_coupled(weight, 3, clusters)) for clusters in (1, 2, 4, 8, 24)]
    assert by_rank == sorted(by_rank, reverse=True) and by_rank[0] > 1.5 * by_rank[-1]
    assert by_clusters == sorted(by_clusters, reverse=True) and by_clusters[0] > 1.5 * by_clusters[-1]


@pytest.mark.parametrize("seed", range(8))
def test_clusters_are_those_of_the_best_partition_of_a_tiny_layer(seed: int) -> None:
    weight = weight_of(6, 5, 1, 3, seed=seed)
    partitions = [{0, *rest} for rest in combinations(range(1, 6), 2)]
    errors = [
        cut_energy(weight[sorted(part)], 2) + cut_energy(weight[sorted(set(range(6)) - part)], 2) for part in partitions
    ]
    found = layer_nmse(weight, decompose_coupled(weight, 2, 2)) * float(weight.square().sum())
    assert found >= min(errors) - 1e-6
    assert found <= sorted(errors)[2] + 1e-6  # a local search: one of the best three of ten


def test_filters_of_known_subspaces_are_found_and_cost_nothing() -> None:
    bases = weight_of(3, 12, 2)
    label = torch.tensor([2, 0, 1, 1, 0, 2, 2, 0, 1])
    weight = torch.einsum("oir,orhw->oihw", bases[label], weight_of(9, 2, 3, 3, seed=1))
    cluster = cluster_filters([weight], 2, 3)
    assert cluster.tolist() == [0, 1, 2, 2, 1, 0, 0, 1, 2]  # the same clusters, numbered by their first filters
    assert layer_nmse(weight, decompose_coupled(weight, 2, 3)) < 1e-12
    again = decompose_coupled(weight, 2, 3)
    assert torch.equal(again.channels, decompose_coupled(weight, 2, 3).channels)
    # two layers that write the same channels: the second alone has other clusters
    other = torch.einsum("oir,orhw->oihw", bases[label.roll(1)], weight_of(9, 2, 3, 3, seed=2))
    assert cluster_filters([weight, other * 1e-3], 2, 3).bincount().tolist() == [3, 3, 3]


def test_a_zero_filter_does_no_harm() -> None:
    weight = weight_of(4, 5, 3, 3)
    weight[1] = 0
    factors = decompose_coupled(weight, 2, 2)
    assert bool(torch.isfinite(factors.reconstruct()).all()) and float(nmse(weight, factors)[1]) == 0


@pytest.mark.parametrize(
    ("rank", "clusters", "message"),
    [(1, 4, "choose a divisor of 6"), (9, 1, "choose 1 to 8"), (0, 2, "choose 1 to 8"), (5, 6, "choose 1 to 4")],
)
def test_impossible_numbers_are_refused(rank: int, clusters: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        decompose_coupled(weight_of(6, 8, 2, 2), rank, clusters)
    with pytest.raises(UserError, match="NaN"):
        decompose_coupled(weight_of(6, 8, 2, 2) * float("nan"), 1, 1)
