"""Least squares for one layer: what its weights must be to turn given inputs into given outputs.

Everything that the fit needs of the data is two sums over sampled output positions, G = sum p p^T over the input
patches p and H = sum p y^T with the wanted outputs y. Errors and their minimisers follow from G and H in closed
form, for a plain layer and for one CP factor at a time.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from norton_deploy.method.cp import CPFactors

RIDGES = (1e-8, 1e-3, 1e-1)
"""Weights of staying at the present solution, relative to the mean squared input. With the smallest it decides only
where the data does not; with few samples per unknown the larger ones keep the fit from following their noise."""
DOUBLE_FEATURES = 4608
"""Above so many inputs their moments are multiplied in the inputs' own precision, and only added in float64."""
CHUNK_NUMBERS = 2**22
"""Numbers in a temporary tensor at most: several filters share one matrix product, and the memory is reused."""


@dataclass
class NormalEquations:
    """Sums over P samples of inputs p [F] and outputs y [O], float64.

    Attributes:
        samples: P.
        gram: [F, F], sum of p p^T.
        cross: [F, O], sum of p y^T.
        energy: [O], sum of y^2.
        input_sum, output_sum: [F] and [O].
    """

    samples: int
    gram: Tensor
    cross: Tensor
    energy: Tensor
    input_sum: Tensor
    output_sum: Tensor

    @classmethod
    def empty(cls, features: int, outputs: int) -> "NormalEquations":
        """No samples yet."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64)

        return cls(
            0, zeros(features, features), zeros(features, outputs), zeros(outputs), zeros(features), zeros(outputs)
        )

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add samples [P, F] and [P, O]."""
        if inputs.shape[1] > DOUBLE_FEATURES:
            self.gram += (inputs.T @ inputs).double()
        p, y = inputs.double(), outputs.double()
        self.samples += len(p)
        if inputs.shape[1] <= DOUBLE_FEATURES:
            self.gram.addmm_(p.T, p)
        self.cross.addmm_(p.T, y)
        self.energy += y.square().sum(dim=0)
        self.input_sum += p.sum(dim=0)
        self.output_sum += y.sum(dim=0)

    def centred(self) -> "NormalEquations":
        """The same samples with their means taken off: what a layer with a bias has to fit."""
        count = max(self.samples, 1)
        return NormalEquations(
            self.samples,
            self.gram - torch.outer(self.input_sum, self.input_sum) / count,
            self.cross - torch.outer(self.input_sum, self.output_sum) / count,
            self.energy - self.output_sum.square() / count,
            torch.zeros_like(self.input_sum),
            torch.zeros_like(self.output_sum),
        )

    def of_outputs(self, index: Tensor) -> "NormalEquations":
        """The same samples with the outputs `index` [O'] only."""
        return NormalEquations(
            self.samples, self.gram, self.cross[:, index], self.energy[index], self.input_sum, self.output_sum[index]
        )

    def with_prior(self, weight: Tensor, ridge: float) -> "NormalEquations":
        """The same least squares with a pull of `ridge` (relative to the mean squared input) towards weights [O, F]."""
        pull = ridge * self.gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        return NormalEquations(
            self.samples,
            self.gram + pull * torch.eye(len(self.gram), dtype=torch.float64),
            self.cross + pull * weight.double().mT,
            self.energy,
            self.input_sum,
            self.output_sum,
        )

    def merged(self, other: "NormalEquations") -> "NormalEquations":
        """The sums over the samples of both."""
        return NormalEquations(
            *(own + more for own, more in zip(vars(self).values(), vars(other).values(), strict=True))
        )

    @property
    def mean(self) -> Tensor:
        """The mean input [F]."""
        return self.input_sum / max(self.samples, 1)

    def bias(self, weight: Tensor) -> Tensor:
        """The best bias [O] of a layer with these weights [O, F]."""
        return (self.output_sum - weight.double() @ self.input_sum) / max(self.samples, 1)

    def squared_error(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Sum over the samples of (W p + b - y)^2 for weights [O, F]; [O] float64, at least 0."""
        w = weight.double()
        error = self.energy - 2 * torch.einsum("of,fo->o", w, self.cross) + ((w @ self.gram) * w).sum(dim=1)
        if bias is not None:
            b = bias.double()
            error = error + 2 * b * (w @ self.input_sum - self.output_sum) + self.samples * b.square()
        return error.clamp(min=0)

    def fit(self, weight: Tensor, ridge: float = RIDGES[0]) -> Tensor:
        """The least-squares weights [O, F], float64, closest to the present `weight` [O, F]."""
        w = weight.double()
        return w + _solve(self.gram, self.cross - self.gram @ w.T, ridge).T


def fit_factors(equations: NormalEquations, factors: CPFactors, sweeps: int, ridge: float = RIDGES[0]) -> CPFactors:
    """Least-squares CP factors of a CPDBlock from data: C, A and B in turn, each exactly given the other two.

    With A and B fixed the output is linear in C (eq. 4-6 with the spatial kernels as known filters), likewise in A
    and in B. Minimised is the error of the outputs, not that of the weights as in eq. 2. A filter takes a new
    factor only if its error falls, so no filter ever gets worse.

    Args:
        equations: of patches [I * Kh * Kw] and the wanted outputs.
        sweeps: rounds of C, A, B; a last C follows.
    """
    A, B, C = factors.A.double(), factors.B.double(), factors.C.double()
    steps = (_channel_factor, _vertical_factor, _horizontal_factor) * sweeps + (_channel_factor,)
    error = _factor_error(equations, A, B, C)
    for step in steps:
        candidate = step(equations, A, B, C, ridge)
        candidate_error = _factor_error(equations, *candidate)
        better = (candidate_error < error)[:, None, None]
        A, B, C = (torch.where(better, new, old) for new, old in zip(candidate, (A, B, C), strict=True))
        error = torch.minimum(error, candidate_error)
    return CPFactors(A.float(), B.float(), C.float())


def _factor_error(equations: NormalEquations, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    weight = torch.einsum("ohr,owr,oir->oihw", A.float(), B.float(), C.float())
    return equations.squared_error(weight.flatten(1))


def _channel_factor(
    equations: NormalEquations, A: Tensor, B: Tensor, C: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Best C for the spatial kernels of A and B."""
    filters, channels, rank = C.shape
    kernels = torch.einsum("ohr,owr->orhw", A, B).flatten(2)  # [O, R, P]
    positions = kernels.shape[2]
    gram = equations.gram.view(channels, positions, channels, positions)
    gram = torch.einsum("ipjq->pqij", gram).reshape(positions * positions, channels * channels)
    wanted = torch.einsum("ipo,orp->ori", equations.cross.view(channels, positions, filters), kernels)
    present = C.mT.flatten(1)[..., None]  # [O, R * I, 1]
    fitted = torch.empty_like(present)
    step = max(1, CHUNK_NUMBERS // (channels * rank) ** 2)
    for start in range(0, filters, step):
        part = slice(start, start + step)
        pairs = torch.einsum("orp,osq->orspq", kernels[part], kernels[part]).flatten(3)
        normal = (pairs.flatten(0, 2) @ gram).view(-1, rank, rank, channels, channels)
        normal = normal.transpose(2, 3).reshape(-1, rank * channels, rank * channels)
        right = wanted[part].flatten(1)[..., None] - normal @ present[part]
        fitted[part] = present[part] + _solve(normal, right, ridge)
    return A, B, fitted.view(filters, rank, channels).mT.contiguous()


def _vertical_factor(
    equations: NormalEquations, A: Tensor, B: Tensor, C: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Best A for given B and C."""
    eye = torch.eye(A.shape[1], dtype=A.dtype)
    fitted = _small_factor(equations, A, ridge, lambda part: torch.einsum("hg,owr,oir->ihwogr", eye, B[part], C[part]))
    return fitted, B, C


def _horizontal_factor(
    equations: NormalEquations, A: Tensor, B: Tensor, C: Tensor, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Best B for given A and C."""
    eye = torch.eye(B.shape[1], dtype=B.dtype)
    fitted = _small_factor(equations, B, ridge, lambda part: torch.einsum("ohr,wg,oir->ihwogr", A[part], eye, C[part]))
    return A, fitted, C


def _small_factor(
    equations: NormalEquations, factor: Tensor, ridge: float, embedding: Callable[[slice], Tensor]
) -> Tensor:
    """Best factor [O, K, R], whose effect on the weights is linear: weights [I, Kh, Kw] = embedding @ factor."""
    filters, size, rank = factor.shape
    features = len(equations.gram)
    fitted = torch.empty_like(factor)
    step = max(1, CHUNK_NUMBERS // (features * size * rank))
    for start in range(0, filters, step):
        part = slice(start, start + step)
        design = embedding(part).reshape(features, -1, size * rank)  # [F, O', K * R]
        moved = (equations.gram @ design.flatten(1)).view_as(design)
        normal = torch.einsum("fok,fol->okl", design, moved)
        wanted = torch.einsum("fok,fo->ok", design, equations.cross[:, part])[..., None]
        present = factor[part].flatten(1)[..., None]
        fitted[part] = (present + _solve(normal, wanted - normal @ present, ridge)).view(-1, size, rank)
    return fitted


def _solve(normal: Tensor, right: Tensor, ridge: float) -> Tensor:
    """(normal + ridge) x = right for symmetric positive semidefinite [..., n, n] and [..., n, m]."""
    diagonal = normal.diagonal(dim1=-2, dim2=-1)
    level = diagonal.mean(dim=-1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
    factor, failed = torch.linalg.cholesky_ex(
        torch.diagonal_scatter(normal, diagonal + ridge * level, dim1=-2, dim2=-1)
    )
    while bool(failed.any()):  # moments that were multiplied in float32
        ridge *= 10
        regular = torch.diagonal_scatter(normal, diagonal + ridge * level, dim1=-2, dim2=-1)
        factor, failed = torch.linalg.cholesky_ex(regular)
    return torch.cholesky_solve(right, factor)
