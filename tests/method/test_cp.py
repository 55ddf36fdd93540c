"""Filter-wise CPD against closed forms and tensorly."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from tensorly import cp_to_tensor
from tensorly.decomposition import parafac
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import CPFactors, decompose_filters, layer_nmse, max_rank, nmse

KERNELS = [(1, 3), (3, 1), (2, 2), (3, 3), (5, 5), (7, 7)]


def he_weight(filters: int, in_channels: int, kernel: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = (2 / (in_channels * kernel[0] * kernel[1])) ** 0.5
    return scale * torch.randn(filters, in_channels, *kernel, generator=generator)


def structured_weight(filters: int, in_channels: int, kernel: tuple[int, int], noise: float) -> Tensor:
    """Five terms of falling size per filter and white noise, as trained layers have."""
    generator = torch.Generator().manual_seed(1)
    A, B = (torch.randn(filters, size, 5, generator=generator) for size in kernel)
    C = torch.randn(filters, in_channels, 5, generator=generator) * torch.tensor([1.0, 0.7, 0.5, 0.3, 0.2])
    clean = CPFactors(A, B, C).reconstruct()
    return clean + noise * clean.std() * torch.randn(clean.shape, generator=generator)


def test_reconstruction_is_equation_2_entry_by_entry() -> None:
    generator = torch.Generator().manual_seed(0)
    factors = CPFactors(*(torch.randn(2, size, 3, generator=generator) for size in (2, 3, 4)))
    rebuilt = factors.reconstruct()
    assert rebuilt.shape == (2, 4, 2, 3)
    for k, p, m, n in np.ndindex(2, 4, 2, 3):
        terms = [factors.A[k, m, r] * factors.B[k, n, r] * factors.C[k, p, r] for r in range(3)]
        assert float(rebuilt[k, p, m, n]) == pytest.approx(float(sum(terms)), abs=1e-6)


@pytest.mark.parametrize(
    ("in_channels", "kernel", "expected"),
    [(64, (3, 3), 9), (3, (3, 3), 9), (2, (3, 3), 6), (1, (3, 5), 3), (16, (1, 3), 3), (16, (7, 7), 49)],
)
def test_max_rank_is_equation_8(in_channels: int, kernel: tuple[int, int], expected: int) -> None:
    assert max_rank(in_channels, *kernel) == expected


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("in_channels", [1, 2, 4, 60])
def test_the_largest_rank_is_exact(in_channels: int, kernel: tuple[int, int]) -> None:
    weight = he_weight(4, in_channels, kernel)
    factors = decompose_filters(weight, max_rank(in_channels, *kernel))
    torch.testing.assert_close(factors.reconstruct(), weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_planted_rank_two_filter_is_found(kernel: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    planted = CPFactors(*(torch.randn(6, size, 2, generator=generator) for size in (*kernel, 20)))
    weight = planted.reconstruct()
    assert float(nmse(weight, decompose_filters(weight, 2, max_iterations=300, tolerance=1e-6)).max()) < 1e-8


@pytest.mark.parametrize("kernel", [(1, 3), (3, 1)])
def test_a_filter_with_one_row_or_column_is_a_truncated_svd(kernel: tuple[int, int]) -> None:
    weight = he_weight(5, 12, kernel)
    singular = torch.linalg.svdvals(weight.flatten(2).double()).square()
    for rank in (1, 2):
        best = singular[:, rank:].sum(1) / singular.sum(1)
        torch.testing.assert_close(nmse(weight, decompose_filters(weight, rank)), best, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore:Trying to compute SVD")
@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("kind", ["he", "structured"])
def test_as_good_as_tensorly(rank: int, kind: str) -> None:
    weight = he_weight(8, 64, (3, 3)) if kind == "he" else structured_weight(8, 64, (3, 3), noise=0.3)
    ours = nmse(weight, decompose_filters(weight, rank)).mean()
    theirs = []
    for filter_ in weight.double().numpy():
        rebuilt = cp_to_tensor(parafac(filter_, rank, random_state=0))
        theirs.append(((filter_ - rebuilt) ** 2).sum() / (filter_**2).sum())
    assert float(ours) <= 1.02 * float(np.mean(theirs))


def test_filters_with_nearly_parallel_terms_settle() -> None:
    """Where ALS is slow: each filter against tensorly's best of four starts."""
    rank = 4
    generator = torch.Generator().manual_seed(3)
    A, B, C = (torch.randn(8, size, rank, generator=generator) for size in (3, 3, 16))
    weight = CPFactors(*(part[:, :, :1] + 0.3 * part for part in (A, B, C))).reconstruct()
    weight = weight + 0.02 * weight.std() * torch.randn(weight.shape, generator=generator)
    ours = nmse(weight, decompose_filters(weight, rank))
    for filter_, error in zip(weight.double().numpy(), ours, strict=True):
        rebuilt = (cp_to_tensor(parafac(filter_, rank, init="random", random_state=start)) for start in range(4))
        best = min(((filter_ - one) ** 2).sum() for one in rebuilt) / (filter_**2).sum()
        assert float(error) <= 1.05 * best


@pytest.mark.parametrize("in_channels", [32, 3])
def test_the_error_falls_with_the_rank(in_channels: int) -> None:
    weight = structured_weight(16, in_channels, (3, 3), noise=0.3)
    errors = [layer_nmse(weight, decompose_filters(weight, rank)) for rank in range(1, 10)]
    assert all(high > low or low < 1e-12 for high, low in pairwise(errors))  # rank 6 of three channels is exact
    assert errors[-1] < 1e-12


def test_every_term_has_balanced_columns_falling_norms_and_fixed_signs() -> None:
    factors = decompose_filters(he_weight(10, 24, (3, 5)), 4)
    norms = [torch.linalg.vector_norm(part, dim=1) for part in (factors.A, factors.B, factors.C)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(norms[0], norms[2], rtol=1e-5, atol=0)
    assert bool((norms[0].diff(dim=1) <= 1e-6).all())
    for part in (factors.A, factors.B):
        leading = part.gather(1, part.abs().argmax(dim=1, keepdim=True))
        assert bool((leading > 0).all())


def test_a_filter_is_decomposed_alike_alone_and_in_a_batch() -> None:
    weight = he_weight(12, 24, (3, 3))
    together, alone = decompose_filters(weight, 3), decompose_filters(weight[7:8], 3)
    torch.testing.assert_close(together.select_filters(torch.tensor([7])).C, alone.C, rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_bits() -> None:
    weight = he_weight(6, 24, (3, 3))
    first, second = decompose_filters(weight, 3, seed=5), decompose_filters(weight, 3, seed=5)
    assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in "ABC")


@pytest.mark.parametrize("rank", [1, 2, 5, 9])
def test_degenerate_filters_give_finite_factors(rank: int) -> None:
    weight = torch.zeros(6, 16, 3, 3)
    weight[1, 0, 0, 0] = 1e-30
    weight[2] = 1.0
    weight[3] = torch.eye(3)
    weight[4, :, 1] = he_weight(1, 16, (1, 3))[0, :, 0]
    weight[5] = 1e18 * he_weight(1, 16, (3, 3))[0]
    factors = decompose_filters(weight, rank)
    assert all(bool(torch.isfinite(part).all()) for part in (factors.A, factors.B, factors.C))
    errors = nmse(weight, factors)
    assert float(errors[0]) == 0 and not factors.C[0].any()
    # The rank of filter 3 is 3, that of filter 4 is 3 at most, filters 1 and 2 have rank 1.
    assert float(errors[1:3].max()) < 1e-9
    if rank >= 5:
        assert float(errors[3:5].max()) < 1e-6


def test_nmse_of_known_factors() -> None:
    weight = torch.ones(2, 2, 1, 2)
    half = CPFactors(torch.ones(2, 1, 1), torch.ones(2, 2, 1), torch.tensor([[0.5, 0.5], [1.0, 1.0]])[..., None])
    torch.testing.assert_close(nmse(weight, half), torch.tensor([0.25, 0.0], dtype=torch.float64))
    assert layer_nmse(weight, half) == pytest.approx(0.125)
    assert layer_nmse(torch.zeros(2, 2, 1, 2), decompose_filters(torch.zeros(2, 2, 1, 2), 1)) == 0


def test_selection_of_filters_and_inputs() -> None:
    factors = decompose_filters(he_weight(6, 12, (3, 3)), 2)
    dense = factors.reconstruct()
    filters, inputs = torch.tensor([4, 1]), torch.tensor([0, 3, 11])
    torch.testing.assert_close(factors.select_filters(filters).reconstruct(), dense[filters])
    torch.testing.assert_close(factors.select_inputs(inputs).reconstruct(), dense[:, inputs])


def test_half_precision_weights_are_accepted() -> None:
    weight = he_weight(4, 16, (3, 3)).bfloat16()
    factors = decompose_filters(weight, 9)
    assert factors.C.dtype == torch.float32
    torch.testing.assert_close(factors.reconstruct(), weight.float(), rtol=1e-5, atol=1e-6)


def test_impossible_requests_name_the_numbers() -> None:
    weight = he_weight(4, 2, (3, 3))
    with pytest.raises(UserError, match=r"rank 7 .* 2 x 3 x 3.* 1 to 6"):
        decompose_filters(weight, 7)
    with pytest.raises(UserError, match="rank 0"):
        decompose_filters(weight, 0)
    with pytest.raises(UserError, match="1x1"):
        decompose_filters(he_weight(4, 2, (1, 1)), 1)
    weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match="NaN"):
        decompose_filters(weight, 2)
