"""The factorisations of whole layers against tensorly and exact cases."""

import warnings

import pytest
import torch

from norton_deploy.errors import UserError
from norton_deploy.method.cp import layer_nmse
from norton_deploy.method.layer_factors import LayerCP, ReshapedCP, Tucker2, decompose_layer, leading_left


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
        assert layer_nmse(weight, factors) < 1e-6
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
    assert layer_nmse(weight, factors) == pytest.approx(reference, rel=1e-4 if kind == "tucker2" else 0.03)
    best = decompose_layer(weight, kind, ranks, starts=4, sweeps=400, tolerance=1e-7)  # type: ignore[arg-type]
    assert layer_nmse(weight, best) <= layer_nmse(weight, factors)


def test_full_ranks_are_exact_and_ranks_above_the_channels_work() -> None:
    weight = weight_of(6, 4, 3, 3).float()
    assert layer_nmse(weight, decompose_layer(weight, "tucker2", (6, 4))) < 1e-12
    assert layer_nmse(weight, decompose_layer(weight, "reshaped", (24,), sweeps=400, tolerance=1e-7)) < 1e-3
    errors = [layer_nmse(weight, decompose_layer(weight, "layer", (rank,))) for rank in (2, 8, 20)]
    assert errors[0] > errors[1] > errors[2]


def test_the_same_seed_gives_the_same_bits_and_terms_are_balanced() -> None:
    weight = weight_of(8, 6, 3, 3)
    first, second = (decompose_layer(weight, "layer", (9,), seed=3) for _ in range(2))
    assert isinstance(first, LayerCP) and isinstance(second, LayerCP)
    assert torch.equal(first.output, second.output) and torch.equal(first.vertical, second.vertical)
    torch.testing.assert_close(first.output.norm(dim=0), first.horizontal.norm(dim=0))


def test_mistakes_are_named() -> None:
    weight = weight_of(4, 4, 3, 3)
    with pytest.raises(UserError, match="expected two"):
        decompose_layer(weight, "tucker2", (2,))
    with pytest.raises(UserError, match="at most its channels"):
        decompose_layer(weight, "tucker2", (5, 2))
    with pytest.raises(UserError, match="all zero"):
        decompose_layer(weight * 0, "layer", (2,))


def test_leading_vectors_of_wide_tall_and_deficient_matrices() -> None:
    for matrix in (weight_of(2, 5, 9), weight_of(2, 9, 5), weight_of(2, 9, 2) @ weight_of(2, 2, 5, seed=1)):
        found = leading_left(matrix, 3)
        assert torch.allclose(found.mT @ found, torch.eye(3).double(), atol=1e-9)
        kept = (found.mT @ matrix).square().sum(dim=(1, 2))
        assert torch.allclose(kept, torch.linalg.svdvals(matrix)[:, :3].square().sum(dim=1))
