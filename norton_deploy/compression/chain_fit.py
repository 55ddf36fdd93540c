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
from norton_deploy.method.layer_factors import leading_left

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
    root = _channel_root(equations, channels)
    entry = _entry_for((basis.mT @ best).view(last, channels, positions), root, first)
    for sweep in range(sweeps + 1):
        half = _half_through(entry, equations.gram, positions)
        gram, cross = _through(entry, half, equations.cross, positions)
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
    parts = torch.arange(count).split(count // present.groups)
    crosses = [equations.cross[:, part] for part in parts]
    root = _channel_root(equations, channels)
    entries = [_entry_for(best[part].view(-1, channels, positions), root, rank) for part in parts]
    kernels: list[Tensor] = []
    for sweep in range(sweeps + 1):
        halves = _half_through(torch.cat(entries), equations.gram, positions).view(len(parts), rank * positions, -1)
        kernels = [
            _regression(*_through(entry, half, cross, positions)).view(-1, rank, positions)
            for entry, half, cross in zip(entries, halves, crosses, strict=True)
        ]
        if sweep < sweeps:
            entries = [
                _improve(equations.gram, cross.mT, partial(_expand, own), entry)
                for cross, own, entry in zip(crosses, kernels, entries, strict=True)
            ]
    final = [_orthonormal(entry, own) for entry, own in zip(entries, kernels, strict=True)]
    middle = torch.cat([own for _, own in final]).unflatten(2, (kernel_h, kernel_w))
    return ChainKernels(torch.cat([entry for entry, _ in final])[:, :, None, None], middle, None, present.groups)


def _fit_layer_cp(equations: NormalEquations, present: ChainKernels, sweeps: int) -> ChainKernels:
    """Layer CPD: entry V, one kernel s per term, exit U, W = sum_r u_r s_r v_r^T; U and s are closed-form."""
    entry, kernels, exit = present.entry.flatten(1), present.middle.flatten(1), present.exit
    assert exit is not None  # a layer CPD has one
    exit = exit.flatten(1)
    rank, positions = kernels.shape
    for sweep in range(sweeps + 2):
        half = _half_through(entry, equations.gram, positions)
        gram, cross = _through(entry, half, equations.cross, positions)
        by_position = gram.view(rank, positions, rank, positions)
        exit = _regression(
            torch.einsum("rk,rksl,sl->rs", kernels, by_position, kernels),
            torch.einsum("rk,rko->ro", kernels, cross.view(rank, positions, -1)),
        )
        if sweep > sweeps:
            break
        among = exit.mT @ exit
        weighted = torch.einsum("rs,rksl->rksl", among, by_position).reshape(gram.shape)
        kernels = _regression(weighted, torch.einsum("rko,or->rk", cross.view(rank, positions, -1), exit).view(-1, 1))
        kernels = kernels.view(rank, positions)
        wanted = (equations.cross @ exit).mT
        entry = _improve(equations.gram, wanted, partial(_entry_terms, kernels), entry, among)
    middle = kernels.view_as(present.middle)
    return ChainKernels(entry[:, :, None, None], middle, exit[:, :, None, None], present.groups)


def _entry_terms(kernels: Tensor, entry: Tensor) -> Tensor:
    """The terms [R, I * K] of an entry [R, I] with kernels [R, K], before the exit adds them up."""
    return torch.einsum("ri,rk->rik", entry, kernels).flatten(1)


def _channel_root(equations: NormalEquations, channels: int) -> Tensor:
    """The Cholesky factor [I, I] of the channel moments of the inputs, all positions of the patch together."""
    moments = equations.gram.view(channels, -1, channels, len(equations.gram) // channels)
    return torch.linalg.cholesky(moments.diagonal(dim1=1, dim2=3).mean(dim=2))


def _entry_for(weight: Tensor, root: Tensor, rank: int) -> Tensor:
    """The entry [R, I] by whose R channels weights [O, I, K] lose least under the channel moments of the inputs."""
    scaled = torch.einsum("ij,oik->jok", root, weight).flatten(1)
    directions = leading_left(scaled, rank)
    return torch.linalg.solve_triangular(root.mT, directions, upper=True).mT


def _half_through(entry: Tensor, gram: Tensor, positions: int) -> Tensor:
    """Moments [R K, F] between what an entry [R, I] lets through of the patches and the patches."""
    return (entry @ gram.view(entry.shape[1], -1)).view(len(entry) * positions, -1)


def _through(entry: Tensor, half: Tensor, cross: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Second moments of what an entry [R, I] lets through of the patches: [R K, R K] and [R K, O]."""
    channels = entry.shape[1]
    both = (entry @ half.view(-1, channels, positions)).flatten(1)
    return (both + both.mT) / 2, _half_through(entry, cross, positions)


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


def _improve(
    gram: Tensor, wanted: Tensor, rebuild: Callable[[Tensor], Tensor], start: Tensor, among: Tensor | None = None
) -> Tensor:
    """Conjugate gradients for one factor; `rebuild`, linear, turns it into weights [O, F]; never worse than `start`.

    With `among` [O, O] the error of the rows is not their sum but tr(among W gram W^T).
    """
    found: Any = torch.func.vjp(rebuild, start)
    weight, pull = found

    def moved_by(step: Tensor) -> Tensor:
        return step @ gram if among is None else among @ (step @ gram)

    residual = pull(wanted - moved_by(weight))[0]
    factor, direction, energy = start, residual, residual.square().sum()
    for _ in range(STEPS):
        if float(energy) == 0:
            break
        step = rebuild(direction)
        moved = moved_by(step)
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
