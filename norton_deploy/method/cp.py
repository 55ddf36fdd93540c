"""Canonical polyadic decomposition of a layer's filters, one by one (section II-A, eq. 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.als import fit_spatial_factors, solve_channel_factor, unit_columns

# Norm of a direction that a filter does not use, beside the filter's own norm of 1.
NEGLIGIBLE = 1e-15


@dataclass(frozen=True)
class CPFactors:
    """Factors of O filters of order 3 (eq. 2): W_k[p, m, n] = sum_r A_k[m, r] B_k[n, r] C_k[p, r].

    Attributes:
        A: [O, Kh, R] float32, the vertical factor.
        B: [O, Kw, R] float32, the horizontal factor.
        C: [O, I, R] float32, the channel factor.
    """

    A: Tensor
    B: Tensor
    C: Tensor

    def __post_init__(self) -> None:
        shapes = [tuple(factor.shape) for factor in (self.A, self.B, self.C)]
        if any(len(shape) != 3 for shape in shapes) or len({(shape[0], shape[2]) for shape in shapes}) != 1:
            raise ValueError(f"factors of shapes {shapes}: expected [O, Kh, R], [O, Kw, R] and [O, I, R]")

    @property
    def rank(self) -> int:
        """Number of rank-one terms R of every filter."""
        return self.A.shape[2]

    def reconstruct(self) -> Tensor:
        """The filters [O, I, Kh, Kw] that the factors stand for (eq. 2)."""
        return torch.einsum("ohr,owr,oir->oihw", self.A, self.B, self.C)

    def select_filters(self, index: Tensor) -> "CPFactors":
        """The factors of the filters `index` [O'] (integers), in that order."""
        return CPFactors(self.A[index], self.B[index], self.C[index])

    def select_inputs(self, index: Tensor) -> "CPFactors":
        """The same filters on the input channels `index` [I'] only."""
        return CPFactors(self.A, self.B, self.C[:, index])


def max_rank(in_channels: int, kernel_h: int, kernel_w: int) -> int:
    """Largest rank that a filter can need: min(I Kh, I Kw, Kh Kw) (eq. 8)."""
    return min(in_channels * kernel_h, in_channels * kernel_w, kernel_h * kernel_w)


def nmse(weight: Tensor, factors: CPFactors) -> Tensor:
    """Normalised squared error of every filter: ||W_k - rebuilt W_k||^2 / ||W_k||^2, [O] float64.

    An all-zero filter has 0 if its factors are zero too, infinity otherwise.
    """
    squared_error, energy = _squared_error(weight, factors)
    return torch.where(squared_error == 0, 0.0, squared_error / energy)


def layer_nmse(weight: Tensor, factors: CPFactors) -> float:
    """Sum of the filters' squared errors over their sum of squares: the error of the whole layer."""
    squared_error, energy = (float(part.sum()) for part in _squared_error(weight, factors))
    return 0.0 if squared_error == 0 else squared_error / energy if energy else float("inf")


def _squared_error(weight: Tensor, factors: CPFactors) -> tuple[Tensor, Tensor]:
    exact = weight.detach().double()
    rebuilt = CPFactors(*(factor.detach().double() for factor in (factors.A, factors.B, factors.C)))
    difference = exact - rebuilt.reconstruct()
    return difference.square().sum(dim=(1, 2, 3)), exact.square().sum(dim=(1, 2, 3))


def decompose_filters(
    weight: Tensor, rank: int, *, seed: int = 0, starts: int = 3, max_iterations: int = 50, tolerance: float = 3e-4
) -> CPFactors:
    """Least-squares CPD of every filter of a layer (eq. 2), all filters at once.

    The channel mode is first compressed: ALS needs each filter's [I, Kh*Kw] unfolding by its Gram matrix alone, and
    runs on a Kh*Kw x Kh*Kw root of that, in float64. At the largest rank of eq. 8 the answer is exact and written down
    directly. The columns of A, B and C of one term have equal norms; terms are sorted by falling norm; in each
    column of A and of B the entry of largest magnitude is positive. The factors of a filter depend on that filter
    and the seed only. An all-zero filter has all-zero factors.

    Args:
        weight: [O, I, Kh, Kw], any floating dtype, finite, Kh*Kw >= 2.
        rank: number of terms R, 1 <= R <= max_rank(I, Kh, Kw).
        seed: of the random starts.
        starts: how many starts compete for each filter.
        max_iterations: ALS sweeps at most.
        tolerance: relative fall of a filter's NMSE per sweep below which it has converged.

    Returns:
        Float32 factors on the weight's device.

    Raises:
        UserError: the rank is impossible, the kernel is 1x1, or the weight is not finite.
    """
    if weight.ndim != 4:
        raise ValueError(f"weight of shape {tuple(weight.shape)}: expected [O, I, Kh, Kw]")
    _, in_channels, kernel_h, kernel_w = weight.shape
    if kernel_h * kernel_w < 2:
        raise UserError("a 1x1 convolution has vectors for filters: prune it, there is nothing to decompose")
    limit = max_rank(in_channels, kernel_h, kernel_w)
    if not 1 <= rank <= limit:
        raise UserError(
            f"rank {rank} is impossible for filters of {in_channels} x {kernel_h} x {kernel_w}: "
            f"choose 1 to {limit} (eq. 8)"
        )
    if starts < 1 or max_iterations < 1:
        raise UserError(f"starts={starts} and max_iterations={max_iterations}: both must be at least 1")
    unfolded = weight.detach().double().flatten(2)
    gram = unfolded.mT @ unfolded
    norm = gram.diagonal(dim1=1, dim2=2).sum(dim=1).sqrt()[:, None, None]
    if not bool(torch.isfinite(norm).all()):
        raise UserError("the weight has NaN or infinite values: it cannot be decomposed")
    if rank == limit:
        A, B, C = _exact_factors(unfolded.unflatten(2, (kernel_h, kernel_w)))
    else:
        roots = _roots(gram / torch.where(norm > 0, norm, 1).square())[:, -max(in_channels, rank) :]
        cores = roots.unflatten(2, (kernel_h, kernel_w))
        A, B = fit_spatial_factors(
            cores, rank, seed=seed, starts=starts, max_iterations=max_iterations, tolerance=tolerance
        )
        C = solve_channel_factor(unfolded, A, B)
    A, B, C = _canonical(A, B, C)
    return CPFactors(A.float(), B.float(), C.float())


def _roots(gram: Tensor) -> Tensor:
    """S [N, K, K] with S^T S = `gram` [N, K, K]: its rows are orthogonal and of rising norm.

    Where the norm is 0 it becomes `NEGLIGIBLE`, so that the row still has a direction for ALS to start from.
    """
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp_min(NEGLIGIBLE**2).sqrt()[:, :, None] * vectors.mT


def _exact_factors(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The decomposition of rank max_rank: unit vectors in two modes, the filter's fibres in the third."""
    count, in_channels, kernel_h, kernel_w = weight.shape

    def unit_pairs(first: int, second: int) -> tuple[Tensor, Tensor]:
        """Unit vectors [O, first, R] and [O, second, R] whose pairs run over all first*second positions."""
        eye = torch.eye(first * second, dtype=weight.dtype, device=weight.device).view(first, second, -1)
        return eye.sum(1).expand(count, -1, -1), eye.sum(0).expand(count, -1, -1)

    rank = max_rank(in_channels, kernel_h, kernel_w)
    if rank == kernel_h * kernel_w:
        return *unit_pairs(kernel_h, kernel_w), weight.flatten(2)
    if rank == in_channels * kernel_h:
        C, A = unit_pairs(in_channels, kernel_h)
        return A, torch.einsum("oihw->owih", weight).flatten(2), C
    C, B = unit_pairs(in_channels, kernel_w)
    return torch.einsum("oihw->ohiw", weight).flatten(2), B, C


def _canonical(A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Fix what eq. 2 leaves open: equal norms within a term, terms by falling norm, signs into C."""
    A, norm_A = unit_columns(A)
    B, norm_B = unit_columns(B)
    C, norm_C = unit_columns(C)
    sign_A, sign_B = _leading_sign(A), _leading_sign(B)
    norm = norm_A * norm_B * norm_C
    order = norm.argsort(dim=1, descending=True, stable=True)[:, None]
    scale = norm.pow(1 / 3)[:, None]
    A, B, C = A * sign_A * scale, B * sign_B * scale, C * sign_A * sign_B * scale
    return A.take_along_dim(order, 2), B.take_along_dim(order, 2), C.take_along_dim(order, 2)


def _leading_sign(columns: Tensor) -> Tensor:
    """Sign [N, 1, R] of the entry of largest magnitude of each column; 1 for a zero column."""
    leading = columns.take_along_dim(columns.abs().argmax(dim=1, keepdim=True), dim=1)
    return torch.where(leading < 0, -1.0, 1.0).to(columns.dtype)
