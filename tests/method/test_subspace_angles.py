"""Principal angles against hand-made subspaces and SciPy."""

import math

import pytest
import torch
from scipy.linalg import subspace_angles
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import CPFactors
from norton_deploy.method.filter_selection import pabs_distance, principal_angles


def random_factors(filters: int, in_channels: int, rank: int, seed: int = 0) -> CPFactors:
    generator = torch.Generator().manual_seed(seed)
    return CPFactors(*(torch.randn(filters, size, rank, generator=generator) for size in (3, 3, in_channels)))


@pytest.mark.parametrize("size,rank", [(3, 1), (3, 2), (20, 1), (20, 2), (20, 5)])
def test_angles_are_scipys(size: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(count, size, rank, generator=generator) for count in (4, 3))
    angles = principal_angles(X, Y)
    assert angles.shape == (4, 3, rank)
    for i in range(4):
        for j in range(3):
            expected = torch.tensor(subspace_angles(X[i].double().numpy(), Y[j].double().numpy()).copy())
            torch.testing.assert_close(angles[i, j], expected.sort().values, rtol=0, atol=1e-7)


def test_a_known_small_angle_is_kept() -> None:
    for angle in (1e-9, 1e-7, 3e-6, 1e-3, 0.5, math.pi / 2):
        X = torch.eye(4, 2, dtype=torch.float64)
        Y = torch.zeros(4, 2, dtype=torch.float64)
        Y[0, 0], Y[1, 1], Y[2, 1] = 1, math.cos(angle), math.sin(angle)
        angles = principal_angles(X[None], Y[None])[0, 0]
        assert float(angles[0]) < 1e-15
        assert float(angles[1]) == pytest.approx(angle, rel=1e-6)


@pytest.mark.parametrize("measure", ["largest", "norm"])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_scale_sign_and_order_of_columns_do_not_matter(rank: int, measure: str) -> None:
    factors = random_factors(6, 30, rank)
    order = torch.randperm(rank, generator=torch.Generator().manual_seed(1))
    scale = torch.tensor([-3e-5, 1e4, 40.0, 1e-4])[:rank]
    changed = CPFactors(*((part * scale)[..., order] for part in (factors.A, factors.B, factors.C)))
    torch.testing.assert_close(
        pabs_distance(changed, measure=measure), pabs_distance(factors, measure=measure), rtol=0, atol=1e-6
    )
    # The same filter under two names is at distance 0 (eq. 10).
    twins = CPFactors(*(torch.cat([getattr(factors, n), getattr(changed, n)]) for n in "ABC"))
    assert float(pabs_distance(twins, measure=measure)[:6, 6:].diagonal().max()) < 1e-6


def test_orthogonal_filters_are_farthest() -> None:
    eye = torch.eye(3)[:, :, None]
    basis = CPFactors(eye, eye, torch.eye(3, 8)[:, :, None])
    expected = math.pi / 2 * (1 - torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(pabs_distance(basis), expected)


def test_equation_11_weighs_the_modes() -> None:
    factors = random_factors(5, 12, 1)
    line = [lines(part) for part in (factors.A, factors.B, factors.C)]
    expected = 0.2 * line[0] + 0.5 * line[1] + 0.3 * line[2]
    torch.testing.assert_close(pabs_distance(factors, (0.2, 0.5, 0.3)), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(pabs_distance(factors), sum(line) / 3, rtol=0, atol=1e-7)


def lines(factor: Tensor) -> Tensor:
    """Angle between lines by the arc cosine: [O, n, 1] -> [O, O]."""
    unit = torch.nn.functional.normalize(factor[..., 0].double(), dim=1)
    angle = (unit @ unit.T).abs().clamp(max=1).acos()
    return angle.fill_diagonal_(0)


def test_vectors_of_a_1x1_convolution() -> None:
    vectors = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    expected = torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2], [1, 1, 0, 1], [2, 2, 1, 0]]) * math.pi / 4
    torch.testing.assert_close(pabs_distance(vectors), expected.double())


def test_the_norm_measure_is_the_2_norm_of_all_angles() -> None:
    factors = random_factors(4, 15, 2)
    expected = sum(
        torch.linalg.vector_norm(principal_angles(part, part), dim=-1) for part in (factors.A, factors.B, factors.C)
    )
    distance = pabs_distance(factors, measure="norm")
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    torch.testing.assert_close(distance[off_diagonal], expected[off_diagonal] / 3, rtol=0, atol=1e-7)


@pytest.mark.parametrize("rank", [3, 4, 9])
def test_factors_that_span_everything_do_not_count(rank: int) -> None:
    factors = random_factors(5, 40, rank)
    only_C = pabs_distance(factors, (0, 0, 1))
    torch.testing.assert_close(pabs_distance(factors), only_C / 3)


def test_rank_deficient_factors_count_with_their_numerical_dimension() -> None:
    e = torch.eye(5)
    zero = torch.zeros(5)
    subspaces = [(e[0], e[1]), (e[0], 2 * e[0]), (e[1], zero), (zero, zero), (e[0] + e[1], e[0] - e[1])]
    X = torch.stack([torch.stack(columns, dim=1) for columns in subspaces])
    largest = principal_angles(X, X)[..., -1] / (math.pi / 2)
    expected = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 1, 1, 1], [1, 1, 0, 1, 1], [1, 1, 1, 0, 1], [0, 1, 1, 1, 0]])
    torch.testing.assert_close(largest, expected.double())
    # A line inside a plane: one angle is 0, the dimension without a partner counts pi/2.
    torch.testing.assert_close(principal_angles(X[:1], X[1:2])[0, 0], torch.tensor([0, math.pi / 2]).double())
    # A line half-way between two lines of a plane's complement keeps its one true angle and no more.
    tilted = torch.stack([e[0] + e[2], zero], dim=1)[None]
    angles = principal_angles(tilted, X[1:2])[0, 0]
    torch.testing.assert_close(angles, torch.tensor([0, math.pi / 4]).double())


def test_columns_that_are_parallel_but_for_rounding_span_a_line() -> None:
    column = torch.randn(40, 1, generator=torch.Generator().manual_seed(0))
    twice = torch.cat([column, column / 3], dim=1)[None]
    alone = torch.cat([column, torch.zeros_like(column)], dim=1)[None]
    assert float(principal_angles(twice, alone)[0, 0, -1]) < 1e-6


def test_nearly_equal_subspaces_of_different_dimension() -> None:
    plane = torch.eye(6, 2, dtype=torch.float64)
    line = torch.zeros(6, 2, dtype=torch.float64)
    line[0, 0], line[3, 0] = 1, 1e-8
    for X, Y in ((plane, line), (line, plane)):
        angles = principal_angles(X[None], Y[None])[0, 0]
        assert float(angles[0]) == pytest.approx(1e-8, rel=1e-6)
        assert float(angles[1]) == pytest.approx(math.pi / 2)


def test_many_filters_in_blocks_equal_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = random_factors(23, 17, 2)
    whole = pabs_distance(factors)
    monkeypatch.setattr("norton_deploy.method.filter_selection.BLOCK_NUMBERS", 500)
    torch.testing.assert_close(pabs_distance(factors), whole, rtol=0, atol=1e-12)
    assert torch.equal(whole, whole.T) and not whole.diagonal().any()


def test_wrong_settings_are_named() -> None:
    factors = random_factors(3, 4, 1)
    with pytest.raises(UserError, match="sum is 1"):
        pabs_distance(factors, (0.5, 0.5, 0.5))
    with pytest.raises(UserError, match="sum is 1"):
        pabs_distance(factors, (1.5, -0.5, 0))
    with pytest.raises(UserError, match="'mean'"):
        pabs_distance(factors, measure="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="NaN"):
        pabs_distance(torch.full((2, 3), torch.nan))
