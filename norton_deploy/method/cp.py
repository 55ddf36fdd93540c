"""Canonical polyadic decomposition (CPD) of filters, one by one, by alternating least squares (section II-A, eq. 2)."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from norton_deploy.errors import UserError

# Norm of a direction that a filter does not use, beside the filter's own norm of 1.
NEGLIGIBLE = 1e-15
# Columns have norms near 1 when a Gram matrix is solved, so this bounds its condition
# number by about 1e12: parallel columns and zero tensors give finite numbers, and regular ones lose nothing visible.
RIDGE = 1e-12
# Starts run this many sweeps before all but the best of each tensor are dropped.
SCREENING_SWEEPS = 2
# Each sweep starts this fraction of the last step further on, which saves two sweeps of three; where the error
# rose, the next sweep starts without it.
MOMENTUM = 0.7
# Differences of the NMSE below this are rounding.
ROUNDING = 1e-15


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


class Factors(Protocol):
    """Any decomposition of a layer's filters: a dataclass of tensors."""

    def reconstruct(self) -> Tensor:
        """The filters [O, I, Kh, Kw] that the factors stand for."""


def nmse(weight: Tensor, factors: Factors) -> Tensor:
    """Normalised squared error of every filter: ||W_k - rebuilt W_k||^2 / ||W_k||^2, [O] float64.

    An all-zero filter has 0 if its factors are zero too, infinity otherwise.
    """
    squared_error, energy = _squared_error(weight, factors)
    return torch.where(squared_error == 0, 0.0, squared_error / energy)


def layer_nmse(weight: Tensor, factors: Factors) -> float:
    """Sum of the filters' squared errors over their sum of squares: the error of the whole layer."""
    squared_error, energy = (float(part.sum()) for part in _squared_error(weight, factors))
    return 0.0 if squared_error == 0 else squared_error / energy if energy else float("inf")


def _squared_error(weight: Tensor, factors: Factors) -> tuple[Tensor, Tensor]:
    exact = weight.detach().double()
    parts = {name: part.detach() for name, part in vars(factors).items()}
    exact_parts = {name: part.double() for name, part in parts.items() if part.is_floating_point()}
    difference = exact - type(factors)(**parts | exact_parts).reconstruct()
    return difference.square().sum(dim=(1, 2, 3)), exact.square().sum(dim=(1, 2, 3))


def decompose_filters(
    weight: Tensor, rank: int, *, seed: int = 0, starts: int = 3, max_iterations: int = 300, tolerance: float = 3e-5
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


def fit_spatial_factors(
    cores: Tensor, rank: int, *, seed: int, starts: int, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Least-squares CPD of every tensor of a batch; the channel factor is left to the caller.

    For given A and B the best C is a linear least-squares solution, so A and B are the whole answer.
    Every start runs a few sweeps on every tensor, the best one of each tensor is iterated until one sweep
    lowers its NMSE by less than `tolerance` times that NMSE. Each tensor's result depends on that tensor and
    the seed alone, not on its neighbours in the batch.

    Args:
        cores: [N, M, Kh, Kw] float64, of norm 1 or 0 each; their M parts are orthogonal and of rising norm.
        rank: number of terms R >= 1.
        seed: of the random starts, which are the same for all tensors.
        starts: number of starts >= 1. The first comes from the singular vectors, the others are random.
        max_iterations: sweeps at most, those of the screening included.
        tolerance: relative fall of the NMSE per sweep below which a tensor counts as converged.

    Returns:
        A [N, Kh, R] and B [N, Kw, R], float64, columns of norm 1 (0 where a term is unused).
    """
    count, _, kernel_h, kernel_w = cores.shape
    generator = torch.Generator().manual_seed(seed)
    A, B = _singular_start(cores, rank)
    A, B = A[:, None], B[:, None]
    if starts > 1:
        random_A = torch.randn(starts - 1, kernel_h, rank, generator=generator, dtype=torch.float64)
        random_B = torch.randn(starts - 1, kernel_w, rank, generator=generator, dtype=torch.float64)
        A = torch.cat([A, random_A.to(cores.device).expand(count, -1, -1, -1)], dim=1)
        B = torch.cat([B, random_B.to(cores.device).expand(count, -1, -1, -1)], dim=1)
    screening = min(SCREENING_SWEEPS, max_iterations) if starts > 1 else 0
    if screening:
        copies = cores.repeat_interleave(starts, dim=0)
        A, B, error = _sweep(copies, A.flatten(0, 1), B.flatten(0, 1), screening, tolerance)
        best = error.view(count, starts).argmin(dim=1)
        rows = torch.arange(count, device=cores.device)
        A = A.view(count, starts, kernel_h, rank)[rows, best]
        B = B.view(count, starts, kernel_w, rank)[rows, best]
    else:
        A, B = A[:, 0], B[:, 0]
    A, B, _ = _sweep(cores, A, B, max_iterations - screening, tolerance)
    return A, B


def solve_channel_factor(unfolded: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """Least-squares C [N, I, R] for unfolded [N, I, Kh*Kw] and unit-norm A [N, Kh, R], B [N, Kw, R]."""
    return _solve_gram(_gram(A) * _gram(B), unfolded @ khatri_rao(A, B))


def khatri_rao(A: Tensor, B: Tensor) -> Tensor:
    """Column-wise Kronecker product: [N, Kh, R], [N, Kw, R] -> [N, Kh*Kw, R]."""
    return (A[:, :, None] * B[:, None, :]).flatten(1, 2)


def unit_columns(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of [N, K, R] divided by their norms [N, R]; a zero column stays zero."""
    norm = factor.square().sum(dim=1).sqrt()
    return factor / norm.clamp_min(torch.finfo(norm.dtype).tiny)[:, None], norm


def _singular_start(cores: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading singular vectors of the channel unfolding, each as its best rank-one Kh x Kw matrix."""
    left, _, right = torch.linalg.svd(cores[:, -rank:].flip(1), full_matrices=False)
    return left[..., 0].mT, right[..., 0, :].mT


def _sweep(cores: Tensor, A: Tensor, B: Tensor, sweeps: int, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """At most `sweeps` rounds of C, A, B with momentum; tensors that have converged leave the batch.

    Returns unit-norm A, B and the error's energy [N].
    """
    A, B = unit_columns(A)[0], unit_columns(B)[0]
    energy = cores.square().sum(dim=(1, 2, 3))
    final_A, final_B, final_error = A.clone(), B.clone(), energy.clone()
    active = torch.arange(len(cores), device=cores.device)
    unfolded, previous, ahead_A, ahead_B = cores.flatten(2), energy, A, B
    for _ in range(sweeps):
        C, _ = unit_columns(solve_channel_factor(unfolded, ahead_A, ahead_B))
        # [N, Kh, Kw, R]: the tensors contracted with C, needed for both of the other updates.
        contracted = (unfolded.mT @ C).unflatten(1, (A.shape[1], B.shape[1]))
        gram_C = _gram(C)
        next_A = _solve_gram(_gram(ahead_B) * gram_C, (contracted * ahead_B[:, None]).sum(dim=2))
        next_A, _ = unit_columns(next_A)
        right_side = (contracted * next_A[:, :, None]).sum(dim=1)
        next_B = _solve_gram(_gram(next_A) * gram_C, right_side)
        # B is the exact minimiser, so the residual's energy is what its projection leaves.
        error = (energy - (next_B * right_side).sum(dim=(1, 2))).clamp_min(0)
        next_B, _ = unit_columns(next_B)

        momentum = torch.where(error <= previous, MOMENTUM, 0.0)[:, None, None]
        ahead_A = torch.addcmul(next_A, momentum, next_A - A)
        ahead_B = torch.addcmul(next_B, momentum, next_B - B)
        going = (previous - error).abs() > tolerance * error + ROUNDING
        A, B, previous = next_A, next_B, error
        if not bool(going.all()):
            final_A[active], final_B[active], final_error[active] = A, B, error
            active, unfolded, energy, previous = (part[going] for part in (active, unfolded, energy, previous))
            A, B, ahead_A, ahead_B = (part[going] for part in (A, B, ahead_A, ahead_B))
            if not len(active):
                return final_A, final_B, final_error
    final_A[active], final_B[active], final_error[active] = A, B, previous
    return final_A, final_B, final_error


def _gram(factor: Tensor) -> Tensor:
    """[N, K, R] -> [N, R, R]."""
    return factor.mT @ factor


def _solve_gram(gram: Tensor, right_side: Tensor) -> Tensor:
    """X [N, K, R] with X gram = right_side, by a regularised Cholesky factorisation; `gram` is overwritten."""
    if gram.shape[-1] == 1:
        return right_side / (gram + RIDGE)
    gram.diagonal(dim1=1, dim2=2).add_(RIDGE)
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(right_side.mT, factor).mT
