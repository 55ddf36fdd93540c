"""MACs of the rivals of Figure 1, and their ranks within a budget."""

import pytest
import torch

from benchmarks.lib.rival_layers import chain, chain_macs, ranks_within
from norton_deploy.errors import UserError
from norton_deploy.method.layer_factors import LAYER_FORMS


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_macs_are_the_closed_forms() -> None:
    O, I, Kh, Kw, R = 20, 12, 3, 5, 4  # noqa: E741
    one, big, small = (1, 1), (16, 18), (8, 9)  # stride 2
    kernel = (Kh, Kw)
    # over maps of one position MACs are the numbers in the kernels
    assert chain_macs(chain("filter", O, I, (R,)), kernel, one, one) == R * O * (I + Kh + Kw)
    assert chain_macs(chain("layer", O, I, (R,)), kernel, one, one) == R * (I + Kw + Kh + O)
    assert chain_macs(chain("reshaped", O, I, (R,)), kernel, one, one) == R * (I + Kh * Kw + O)
    assert chain_macs(chain("tucker2", O, I, (R, 3)), kernel, one, one) == 3 * I + 3 * R * Kh * Kw + R * O
    expected = R * (I * 16 * 18 + Kw * 16 * 9 + (Kh + O) * 8 * 9)
    assert chain_macs(chain("layer", O, I, (R,)), kernel, big, small) == expected
    expected = 3 * I * 16 * 18 + (3 * R * Kh * Kw + R * O) * 8 * 9
    assert chain_macs(chain("tucker2", O, I, (R, 3)), kernel, big, small) == expected


@pytest.mark.parametrize("kind", LAYER_FORMS)
@pytest.mark.parametrize(("shape", "rank"), [((64, 3, 3, 3), 1), ((48, 32, 3, 3), 2), ((32, 48, 1, 3), 3)])
def test_ranks_come_closest_to_the_budget_from_below(kind: str, shape: tuple[int, ...], rank: int) -> None:
    weight, size, kernel = weight_of(*shape), (8, 8), (shape[2], shape[3])
    budget = chain_macs(chain("filter", shape[0], shape[1], (rank,)), kernel, size, size)

    def macs(*ranks: int) -> int:
        return chain_macs(chain(kind, shape[0], shape[1], ranks), kernel, size, size)  # type: ignore[arg-type]

    ranks = ranks_within(kind, weight, budget, size, size)  # type: ignore[arg-type]
    assert macs(*ranks) <= budget
    at_exact = ranks[0] == shape[0] if kind == "tucker2" else ranks[0] >= weight.numel() // max(shape)
    assert at_exact or macs(ranks[0] + 1, *ranks[1:]) > budget
    with pytest.raises(UserError, match="below rank 1"):
        ranks_within(kind, weight, 10, size, size)  # type: ignore[arg-type]


def test_tucker_pairs_have_the_smallest_error_of_the_truncated_hosvd() -> None:
    weight, size, kernel = weight_of(12, 10, 3, 3), (4, 4), (3, 3)
    budget = chain_macs(chain("filter", 12, 10, (2,)), kernel, size, size)
    output, source = (torch.linalg.svd(weight.movedim(mode, 0).flatten(1)).U for mode in (0, 1))
    errors = {}
    for p in range(1, 13):
        for q in range(1, 11):
            if chain_macs(chain("tucker2", 12, 10, (p, q)), kernel, size, size) <= budget:
                near = output[:, :p] @ output[:, :p].T, source[:, :q] @ source[:, :q].T
                errors[p, q] = float((weight - torch.einsum("oihw,op,ij->pjhw", weight, *near)).square().sum())
    assert ranks_within("tucker2", weight, budget, size, size) == min(errors, key=lambda pair: errors[pair])


def test_tucker_ranks_that_buy_nothing_are_not_chosen() -> None:
    # Only two input channels are independent: more input ranks than two buy nothing.
    weight = torch.einsum("oqhw,iq->oihw", weight_of(16, 2, 3, 3), weight_of(16, 2, seed=1))
    budget = chain_macs(chain("tucker2", 16, 16, (9, 2)), (3, 3), (4, 4), (4, 4))
    assert ranks_within("tucker2", weight, budget, (4, 4), (4, 4)) == (9, 2)
