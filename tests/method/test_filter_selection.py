"""Algorithm 1 against a literal double loop over its lines."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import decompose_filters
from norton_deploy.method.filter_selection import choose_by_angles, select_filters


def algorithm_1(distance: Tensor, keep: int) -> list[int]:
    """The paper's nine lines, as they stand."""
    D = distance.double().tolist()
    present = list(range(len(D)))
    while len(present) > keep:
        shortest, i, j = math.inf, -1, -1
        for x in present:
            for y in present:
                if x != y and D[x][y] < shortest:
                    shortest, i, j = D[x][y], x, y
        sum_i = math.fsum(D[i][k] for k in present if k != i)
        sum_j = math.fsum(D[j][k] for k in present if k != j)
        present.remove(i if sum_i <= sum_j else j)
    return present


def symmetric(count: int, seed: int, levels: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    upper = torch.rand(count, count, generator=generator, dtype=torch.float64).triu(1)
    if levels is not None:
        upper = (upper * levels).floor()
    return upper + upper.T


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("levels", [None, 2, 5])
def test_equals_the_literal_double_loop(seed: int, levels: int | None) -> None:
    distance = symmetric(24, seed, levels)
    for keep in (1, 2, 7, 20, 23, 24):
        assert select_filters(distance, keep).tolist() == algorithm_1(distance, keep)


def test_the_filter_closest_to_the_rest_goes() -> None:
    # 0 and 1 are the closest pair, and 1 lies nearer to 2 and 3.
    distance = torch.tensor([[0, 1, 9, 9], [1, 0, 5, 5], [9, 5, 0, 7], [9, 5, 7, 0]]).double()
    assert select_filters(distance, 3).tolist() == [0, 2, 3]


def test_a_tie_of_the_sums_deletes_the_first() -> None:
    assert select_filters(torch.ones(4, 4), 3).tolist() == [1, 2, 3]
    assert select_filters(torch.ones(4, 4), 1).tolist() == [3]


def test_the_sum_is_over_the_filters_still_present() -> None:
    entries = {(0, 1): 1, (0, 2): 30, (0, 3): 90, (0, 4): 2, (1, 2): 80, (1, 3): 80, (1, 4): 80}
    entries |= {(2, 3): 40, (2, 4): 45, (3, 4): 20}
    distance = torch.zeros(5, 5, dtype=torch.float64)
    for (i, j), value in entries.items():
        distance[i, j] = distance[j, i] = value
    assert select_filters(distance, 4).tolist() == [1, 2, 3, 4]
    # Then 3 and 4 are closest: 140 against 145 among those present; with filter 0 it would be 230 against 147.
    assert select_filters(distance, 3).tolist() == [1, 2, 4]


def test_order_is_ascending_and_the_input_is_not_changed() -> None:
    distance = symmetric(12, 3)
    before = distance.clone()
    kept = select_filters(distance, 5)
    assert kept.dtype == torch.int64 and kept.tolist() == sorted(set(kept.tolist()))
    assert torch.equal(distance, before)


@pytest.mark.parametrize("keep", [0, -1, 5])
def test_keep_out_of_range_names_the_numbers(keep: int) -> None:
    with pytest.raises(UserError, match=f"keep={keep} filters of 4: choose 1 to 4"):
        select_filters(torch.ones(4, 4), keep)


def test_what_is_not_a_distance_matrix_is_refused() -> None:
    with pytest.raises(ValueError, match="symmetric"):
        select_filters(torch.rand(4, 4), 2)
    with pytest.raises(ValueError, match=r"\[O, O\]"):
        select_filters(torch.ones(4, 3), 2)


def filters(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randn(count, length, generator=torch.Generator().manual_seed(seed))


choose_living_by_angles = partial(choose_by_angles, dead=1e-2)


def test_filters_that_were_switched_off_go_first_though_their_angles_are_the_largest() -> None:
    vectors = filters(12, 40)
    vectors[::3] = torch.eye(40)[0] + 0.1 * vectors[::3]  # four that training has made alike
    decayed = vectors.clone()
    off = torch.arange(12) % 3 > 0
    decayed[off] *= 1e-3
    assert choose_by_angles([decayed], 4).tolist() != [0, 3, 6, 9]  # angles see no lengths
    assert choose_living_by_angles([decayed], 4).tolist() == [0, 3, 6, 9]
    living = [0, 3, 6, 9]
    among = [living[index] for index in choose_by_angles([decayed[living]], 2).tolist()]
    assert choose_living_by_angles([decayed], 2).tolist() == among
    decayed[4] *= decayed[off].norm(dim=1).max() / decayed[4].norm() * 1.5
    assert choose_living_by_angles([decayed], 5).tolist() == [0, 3, 4, 6, 9]
    assert choose_living_by_angles([vectors], 5).tolist() == choose_by_angles([vectors], 5).tolist()
    # a channel of coupled layers lives if one of them uses it
    assert choose_living_by_angles([decayed, vectors], 5).tolist() == choose_by_angles([decayed, vectors], 5).tolist()


def test_decomposed_filters_are_switched_off_by_the_length_of_their_product() -> None:
    factors = decompose_filters(filters(6, 4 * 9).view(6, 4, 3, 3), 2)
    for factor in (factors.A, factors.B, factors.C):
        factor[[1, 4]] *= 0.1  # 0.001 together
    assert choose_living_by_angles([factors], 4).tolist() == [0, 2, 3, 5]


def test_a_dead_filter_is_pruned_first() -> None:
    for count in (8, 2):
        vectors = filters(9, 12)
        vectors[3] = 0
        assert 3 not in choose_by_angles([vectors], count).tolist()
    assert choose_by_angles([vectors], 9).tolist() == list(range(9))
    factors = decompose_filters(filters(6, 4 * 9).view(6, 4, 3, 3), 2)
    factors.C[2] *= 1e-9
    assert choose_by_angles([factors], 5).tolist() == [0, 1, 3, 4, 5]
