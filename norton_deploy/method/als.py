"""Alternating least squares for many small tensors at once."""

import torch
from torch import Tensor

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
