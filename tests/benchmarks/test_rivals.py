"""The rivals of Figure 1 against tensorly, exact cases and closed forms."""

import warnings

import pytest
import torch

from benchmarks.lib.rival_layers import chain, chain_macs, ranks_within
from benchmarks.lib.rivals import RIVALS, LayerCP, ReshapedCP, Tucker2, decompose_layer, rival_nmse
from norton_deploy.errors import UserError


def weight_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_weight_that_has_the_form_is_found() -> None:
    layer = LayerCP(weight_of(7, 2), weight_of(5, 2, seed=1), weight_of(3, 2, seed=2), weight_of(3, 2, seed=3))
    reshaped = ReshapedCP(weight_of(7, 2), weight_of(5, 2, seed=1), weight_of(3, 2, 2, seed=2))
    tucker = Tucker2(weight_of(7, 3), weight_of(5, 2, seed=1), weight_of(3, 2, 3, 2, seed=2))
    for kind, exact, ranks in (("layer", layer, (2,)), ("reshaped", reshaped, (2,)), ("tucker2", tucker, (3, 2))):
        weight = exact.reconstruct()
        factors = decompose_layer(weight, kind, ranks, sweeps=500, tolerance=1e-9)  # type: ignore[arg-type]
        assert type(factors) is type(exact)
        assert rival_nmse(weight, factors) < 1e-6
        torch.testing.assert_close(factors.reconstruct().double(), weight, rtol=0, atol=2e-3)


@pytest.mark.parametrize(("kind", "ranks"), [("layer", (6,)), ("reshaped", (6,)), ("tucker2", (7, 5))])
def test_the_error_is_that_of_tensorly(kind: str, ranks: tuple[int, ...]) -> None:
    import tensorly
    from tensorly.decomposition import parafac, partial_tucker

    weight = weight_of(12, 10, 3, 3)
    factors = decompose_layer(weight, kind, ranks, starts=1, sweeps=400, tolerance=1e-7)  # type: ignore[arg-type]
    with warnings.catch_warnings(), tensorly.backend_context("pytorch", local_threadsafe=True):
        warnings.simplefilter("ignore")
        if kind == "tucker2":
            (core, matrices), _ = partial_tucker(weight, ranks, modes=[0, 1], n_iter_max=400, tol=1e-9)
            rebuilt = tensorly.tenalg.multi_mode_dot(core, matrices, modes=[0, 1])
        else:
            tensor = weight if kind == "layer" else weight.flatten(2)
            found = parafac(tensor, ranks[0], n_iter_max=400, init="svd", tol=1e-9, random_state=0)
            rebuilt = tensorly.cp_to_tensor(found).reshape(weight.shape)
    reference = float((weight - rebuilt).square().sum() / weight.square().sum())
    # CPD has local minima: two runs end near each other, not at the same point.
    assert rival_nmse(weight, factors) == pytest.approx(reference, rel=1e-4 if kind == "tucker2" else 0.03)
    best = decompose_layer(weight, kind, ranks, starts=4, sweeps=400, tolerance=1e-7)  # type: ignore[arg-type]
    assert rival_nmse(weight, best) <= rival_nmse(weight, factors)


def test_full_ranks_are_exact_and_ranks_above_the_channels_work() -> None:
    weight = weight_of(6, 4, 3, 3).float()
    assert rival_nmse(weight, decompose_layer(weight, "tucker2", (6, 4))) < 1e-12
    assert rival_nmse(weight, decompose_layer(weight, "reshaped", (24,), sweeps=400, tolerance=1e-7)) < 1e-3
    errors = [rival_nmse(weight, decompose_layer(weight, "layer", (rank,))) for rank in (2, 8, 20)]
    assert errors[0] > errors[1] > errors[2]


def test_the_same_seed_gives_the_same_bits_and_terms_are_balanced() -> None:
    weight = weight_of(8, 6, 3, 3)
    first, second = (decompose_layer(weight, "layer", (9,), seed=3) for _ in range(2))
    assert isinstance(first, LayerCP) and isinstance(second, LayerCP)
    assert torch.equal(first.output, second.output) and torch.equal(first.vertical, second.vertical)
    torch.testing.assert_close(first.output.norm(dim=0), first.horizontal.norm(dim=0))


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


@pytest.mark.parametrize("kind", RIVALS)
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


def test_mistakes_are_named() -> None:
    weight = weight_of(4, 4, 3, 3)
    with pytest.raises(UserError, match="expected two"):
        decompose_layer(weight, "tucker2", (2,))
    with pytest.raises(UserError, match="at most its channels"):
        decompose_layer(weight, "tucker2", (5, 2))
    with pytest.raises(UserError, match="all zero"):
        decompose_layer(weight * 0, "layer", (2,))
