"""Least-squares factors of a FactoredConv from data: what its outputs should be, not what its weight was.

Minimised is tr(W G W^T) - 2 tr(W X) over the weights W [O, I * Kh * Kw] that the chain can stand for, with the second
moments G of the input patches and X of patches and wanted outputs (`NormalEquations`). For Tucker-2 and coupled filters
one half is closed-form: with the entry given, middle and exit are a reduced-rank regression on what the entry lets
through. The entry starts from the directions that matter most to the best unconstrained weights under the inputs'
channel moments, and is improved by a few steps of conjugate gradients; layer CPD alternates between its factors.
Decomposition under the inputs' distribution: arXiv 2511.04494 (NeurIPS 2025).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from norton_deploy.compression.factored_conv import FactoredConv, chain_weight
from norton_deploy.compression.normal_equations import NormalEquations

STEPS = 12
"""Conjugate gradients for one factor."""


@dataclass(frozen=True)
class ChainKernels:
    """Kernels of a chain, float64: entry [F, I, 1, 1], middle [L, F / groups, Kh, Kw], exit [O, L, 1, 1] or None."""

    entry: Tensor
    middle: Tensor
    exit: Tensor | None
    groups: int

    @classmethod
    def of(cls, chain: FactoredConv) -> "ChainKernels":
        """Those now in the chain."""
        entry, middle = chain.entry.weight.detach().double(), chain.middle.weight.detach().double()
        exit = None if chain.exit is None else chain.exit.weight.detach().double()
        return cls(entry, middle, exit, chain.middle.groups)

    @torch.no_grad()
    def load_into(self, chain: FactoredConv) -> None:
        """Put them into a chain of the same shape."""
        chain.entry.weight.copy_(self.entry)
        chain.middle.weight.copy_(self.middle)
        if chain.exit is not None and self.exit is not None:
            chain.exit.weight.copy_(self.exit)

    def weight(self) -> Tensor:
        """The weight [O, I, Kh, Kw] that they stand for."""
        return chain_weight(self.entry, self.middle, self.exit, self.groups)


def fit_chain(
    equations: NormalEquations, present: ChainKernels, sweeps: int, *, best: Tensor | None = None
) -> ChainKernels:
    """The least-squares kernels of a chain.

    Args:
        equations: of patches [I * Kh * Kw] and the wanted outputs; regular, as `NormalEquations.with_prior` makes them.
        present: kernels that say what form and widths the chain has; layer CPD starts from them.
        sweeps: rounds over the factors.
        best: the unconstrained least-squares weights [O, I * Kh * Kw], float64, where they are known.

    Returns:
        New kernels.
    """
    if present.exit is not None and present.groups > 1:
        return _fit_layer_cp(equations, present, sweeps)
    if best is None:
        best = _regression(equations.gram, equations.cross)
    fit = _fit_clusters if present.exit is None else _fit_tucker
    return fit(equations, present, sweeps, best)


def _fit_tucker(equations: NormalEquations, present: ChainKernels, sweeps: int, best: Tensor) -> ChainKernels:
    """Tucker-2: entry V, core and exit U, W = U core V^T."""
    last, first, kernel_h, kernel_w = present.middle.shape
    channels, positions = present.entry.shape[1], kernel_h * kernel_w
    basis = _leading(best @ equations.cross, last)
    entry = _entry_for((basis.mT @ best).view(last, channels, positions), equations, first)
    for sweep in range(sweeps + 1):
        gram, cross = _through(entry, equations.gram, equations.cross, positions)
        through = _regression(gram, cross)
        basis = _leading(through @ cross, last)
        core = (basis.mT @ through).view(last, first, positions)
        if sweep < sweeps:
            # U has orthonormal columns, so the error splits into what U cannot reach and this.
            wanted = (equations.cross @ basis).mT
            entry = _improve(equations.gram, wanted, partial(_expand, core), entry)
    entry, core = _orthonormal(entry, core)
    middle = core.unflatten(2, (kernel_h, kernel_w))
    return ChainKernels(entry[:, :, None, None], middle, basis[:, :, None, None], 1)


def _fit_clusters(equations: NormalEquations, present: ChainKernels, sweeps: int, best: Tensor) -> ChainKernels:
    """Coupled filters: each cluster's entry V and its filters' own kernels D, W = D V^T."""
    count, rank, kernel_h, kernel_w = present.middle.shape
    channels, positions = present.entry.shape[1], kernel_h * kernel_w
    entries, middles = [], []
    best = best.view(count, channels, positions)
    for part in torch.arange(count).split(count // present.groups):
        cross = equations.cross[:, part]
        entry = _entry_for(best[part], equations, rank)
        for sweep in range(sweeps + 1):
            kernels = _regression(*_through(entry, equations.gram, cross, positions)).view(-1, rank, positions)
            if sweep < sweeps:
                entry = _improve(equations.gram, cross.mT, partial(_expand, kernels), entry)
        entry, kernels = _orthonormal(entry, kernels)
        entries.append(entry)
        middles.append(kernels)
    middle = torch.cat(middles).unflatten(2, (kernel_h, kernel_w))
    return ChainKernels(torch.cat(entries)[:, :, None, None], middle, None, present.groups)


def _fit_layer_cp(equations: NormalEquations, present: ChainKernels, sweeps: int) -> ChainKernels:
    """Layer CPD: entry V, one kernel s per term, exit U, W = sum_r u_r s_r v_r^T."""
    entry, kernels = present.entry.flatten(1), present.middle.flatten(1)
    wanted = equations.cross.mT
    for _ in range(sweeps + 1):
        exit = _exit_for(entry, kernels, equations)
        kernels = _improve(equations.gram, wanted, partial(_terms, exit, entry), kernels)
        entry = _improve(equations.gram, wanted, partial(_entry_terms, exit, kernels), entry)
    exit = _exit_for(entry, kernels, equations)
    middle = kernels.view_as(present.middle)
    return ChainKernels(entry[:, :, None, None], middle, exit[:, :, None, None], present.groups)


def _exit_for(entry: Tensor, kernels: Tensor, equations: NormalEquations) -> Tensor:
    """The best exit [O, R] of layer CPD for an entry [R, I] and kernels [R, K]."""
    terms = torch.einsum("ri,rk->ikr", entry, kernels).flatten(0, 1)
    return _regression(terms.mT @ equations.gram @ terms, terms.mT @ equations.cross)


def _entry_terms(exit: Tensor, kernels: Tensor, entry: Tensor) -> Tensor:
    return _terms(exit, entry, kernels)


def _terms(exit: Tensor, entry: Tensor, kernels: Tensor) -> Tensor:
    """Weights [O, I * K] of exit [O, R], entry [R, I] and kernels [R, K]."""
    return torch.einsum("or,ri,rk->oik", exit, entry, kernels).flatten(1)


def _entry_for(weight: Tensor, equations: NormalEquations, rank: int) -> Tensor:
    """The entry [R, I] by whose R channels weights [O, I, K] lose least under the channel moments of the inputs."""
    _, channels, positions = weight.shape
    moments = torch.einsum("ikjk->ij", equations.gram.view(channels, positions, channels, positions)) / positions
    root = torch.linalg.cholesky(moments)
    scaled = torch.einsum("ij,oik->jok", root, weight).flatten(1)
    directions = _leading(scaled @ scaled.mT, rank)
    return torch.linalg.solve_triangular(root.mT, directions, upper=True).mT


def _through(entry: Tensor, gram: Tensor, cross: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Second moments of what an entry [R, I] lets through of the patches: [R K, R K] and [R K, O]."""
    channels = entry.shape[1]
    half = torch.einsum("ri,ikf->rkf", entry, gram.view(channels, positions, -1)).flatten(0, 1)
    both = torch.einsum("ri,fik->frk", entry, half.view(-1, channels, positions)).flatten(1)
    return (both + both.mT) / 2, torch.einsum("ri,iko->rko", entry, cross.view(channels, positions, -1)).flatten(0, 1)


def _expand(kernels: Tensor, entry: Tensor) -> Tensor:
    """Weights [O, I * K] of kernels [O, R, K] on an entry [R, I]."""
    return torch.einsum("ri,ork->oik", entry, kernels).flatten(1)


def _regression(gram: Tensor, cross: Tensor) -> Tensor:
    """The weights [O, F] of least squares."""
    level = gram.diagonal().mean()
    regular = gram + torch.eye(len(gram), dtype=gram.dtype) * (level * 1e-10 + torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(regular)
    if bool(failed):
        return (torch.linalg.pinv(regular, hermitian=True) @ cross).mT
    return torch.cholesky_solve(cross, factor).mT


def _leading(symmetric: Tensor, count: int) -> Tensor:
    """The eigenvectors [n, count] of the largest eigenvalues."""
    return torch.linalg.eigh((symmetric + symmetric.mT) / 2)[1].flip(1)[:, :count]


def _orthonormal(entry: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with orthonormal rows in the entry: factors of like size train alike."""
    rows, mix = torch.linalg.qr(entry.mT)
    return rows.mT, torch.einsum("qr,ork->oqk", mix, kernels)


def _improve(gram: Tensor, wanted: Tensor, rebuild: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    """Conjugate gradients for one factor; `rebuild`, linear, turns it into weights [O, F]; never worse than `start`."""
    found: Any = torch.func.vjp(rebuild, start)
    weight, pull = found
    residual = pull(wanted - weight @ gram)[0]
    factor, direction, energy = start, residual, residual.square().sum()
    for _ in range(STEPS):
        if float(energy) == 0:
            break
        step = rebuild(direction)
        moved = step @ gram
        curvature = (step * moved).sum()
        if float(curvature) <= 0:
            break
        length = energy / curvature
        factor = factor + length * direction
        residual = residual - length * pull(moved)[0]
        following = residual.square().sum()
        direction = residual + following / energy * direction
        energy = following
    return factor
