"""The classical ways to factorise a whole layer: all its filters share their factors (Figure 1).

All of them take the layer's weight [O, I, Kh, Kw] as one tensor and run as a chain of small convolutions:

- "layer": CPD with four factors, pointwise, 1 x Kw and Kh x 1 depthwise, pointwise (Lebedev et al., ICLR 2015);
- "reshaped": CPD with three factors of the tensor [O, I, Kh*Kw], pointwise, Kh x Kw depthwise, pointwise;
- "tucker2": Tucker decomposition of the two channel modes by HOOI, pointwise, a small dense Kh x Kw convolution,
  pointwise (Kim et al., ICLR 2016).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from norton_deploy.errors import UserError
from norton_deploy.method.cp import layer_nmse

LayerForm = Literal["layer", "reshaped", "tucker2"]
LAYER_FORMS: tuple[LayerForm, ...] = ("layer", "reshaped", "tucker2")
# Relative to unit columns: keeps nearly parallel terms, which CPD of whole layers is known for, solvable.
RIDGE = 1e-10


@dataclass(frozen=True)
class LayerCP:
    """CPD of a whole layer: W[o, i, h, w] = sum_r output[o, r] input[i, r] vertical[h, r] horizontal[w, r].

    Attributes: float32 output [O, R], input [I, R], vertical [Kh, R], horizontal [Kw, R].
    """

    output: Tensor
    input: Tensor
    vertical: Tensor
    horizontal: Tensor

    def reconstruct(self) -> Tensor:
        """The weight [O, I, Kh, Kw] that the factors stand for."""
        spatial = torch.einsum("hr,wr->hwr", self.vertical, self.horizontal)
        return ReshapedCP(self.output, self.input, spatial).reconstruct()


@dataclass(frozen=True)
class ReshapedCP:
    """CPD of the reshaped layer: W[o, i, h, w] = sum_r output[o, r] input[i, r] spatial[h, w, r].

    Attributes: float32 output [O, R], input [I, R], spatial [Kh, Kw, R].
    """

    output: Tensor
    input: Tensor
    spatial: Tensor

    def reconstruct(self) -> Tensor:
        """The weight [O, I, Kh, Kw] that the factors stand for."""
        inputs = torch.einsum("ir,hwr->ihwr", self.input, self.spatial)
        return torch.einsum("or,ihwr->oihw", self.output, inputs)


@dataclass(frozen=True)
class Tucker2:
    """Tucker-2: W[o, i, h, w] = sum_pq output[o, p] input[i, q] core[p, q, h, w].

    Attributes: float32 output [O, P] and input [I, Q] with orthonormal columns, core [P, Q, Kh, Kw].
    """

    output: Tensor
    input: Tensor
    core: Tensor

    def reconstruct(self) -> Tensor:
        """The weight [O, I, Kh, Kw] that the factors stand for."""
        inputs = torch.einsum("iq,pqhw->pihw", self.input, self.core)
        return torch.einsum("op,pihw->oihw", self.output, inputs)


LayerFactors = LayerCP | ReshapedCP | Tucker2


def decompose_layer(
    weight: Tensor,
    kind: LayerForm,
    ranks: tuple[int, ...],
    *,
    seed: int = 0,
    starts: int = 4,
    sweeps: int = 100,
    tolerance: float = 3e-4,
) -> LayerFactors:
    """Factorise a layer's whole weight by alternating least squares (CPD) or orthogonal iteration (Tucker-2).

    Runs in float64 from the leading singular vectors of the channel unfoldings, filled up with seeded random
    columns where the rank is larger, until one sweep lowers the error by less than `tolerance` of itself.

    Args:
        weight: [O, I, Kh, Kw], finite, not all zero.
        ranks: (R,), or (P, Q) for "tucker2".
        seed: of the random columns.
        starts: CPDs with other random columns, of which the best is taken, as for the filters' CPD; the orthogonal
            iteration has one start, its outcome hardly depends on it.
        tolerance: relative fall of the squared error per sweep below which it has converged.

    Raises:
        UserError: ranks of the wrong number or size, or a weight that is not finite or all zero.
    """
    if len(ranks) != (2 if kind == "tucker2" else 1) or min(ranks) < 1:
        raise UserError(f"{kind}: ranks {ranks}; expected {'two' if kind == 'tucker2' else 'one'}, each at least 1")
    if not bool(torch.isfinite(weight).all()) or not bool(weight.any()):
        raise UserError("the weight is all zero or has NaN or infinite values: it cannot be decomposed")
    exact = weight.detach().double()
    norm = torch.linalg.vector_norm(exact)
    if kind == "tucker2":
        if ranks[0] > weight.shape[0] or ranks[1] > weight.shape[1]:
            raise UserError(f"tucker2: ranks {ranks} of a layer {tuple(weight.shape)}: at most its channels")
        output, input, core = _orthogonal_iteration(exact / norm, ranks[0], ranks[1], sweeps, tolerance)
        return Tucker2(output.float(), input.float(), (core * norm).float())
    spatial_modes = tuple(weight.shape[2:]) if kind == "layer" else (weight.shape[2] * weight.shape[3],)
    found: list[LayerCP | ReshapedCP] = []
    for start in range(starts):
        output, input, *spatial = _alternating_least_squares(
            exact.flatten(2) / norm, spatial_modes, ranks[0], starts * seed + start, sweeps, tolerance
        )
        output, input, *spatial = _balance([output * norm, input, *spatial])
        if kind == "layer":
            found.append(LayerCP(output, input, spatial[0], spatial[1]))
        else:
            found.append(ReshapedCP(output, input, spatial[0].unflatten(0, tuple(weight.shape[2:]))))
    return min(found, key=lambda factors: layer_nmse(weight, factors))


def _alternating_least_squares(
    tensor: Tensor, spatial_modes: tuple[int, ...], rank: int, seed: int, sweeps: int, tolerance: float
) -> list[Tensor]:
    """CPD of [O, I, S], S being the product of `spatial_modes`, of norm 1: factors [O, R], [I, R], [K, R]...

    Each sweep contracts the tensor only twice, with the input factor [I, R] and with the output factor [O, R];
    every right side follows from these two products.
    """
    out_channels, in_channels, positions = tensor.shape
    generator = torch.Generator().manual_seed(seed)
    output, input = (_leading_columns(tensor, mode, rank, generator) for mode in (0, 1))
    spatial = [
        _unit(torch.randn(mode, rank, generator=generator, dtype=torch.float64).to(tensor.device))
        for mode in spatial_modes
    ]
    over_input = tensor.mT.flatten(0, 1).contiguous()  # [O*S, I]
    over_output = tensor.permute(1, 2, 0).flatten(0, 1).contiguous()  # [I*S, O]
    previous = float("inf")
    for _ in range(sweeps):
        kernels = _kernels(spatial)
        contracted = (over_input @ input).view(out_channels, positions, rank)
        gram_input = _gram(input)
        output = _unit(_solve(gram_input * _gram(kernels), torch.einsum("osr,sr->or", contracted, kernels)))
        gram_channels = gram_input * _gram(output)
        right_side = torch.einsum("osr,or->sr", contracted, output).unflatten(0, spatial_modes)
        if len(spatial) == 1:
            spatial = [_unit(_solve(gram_channels, right_side))]
        else:
            vertical, horizontal = spatial
            rows = torch.einsum("hwr,wr->hr", right_side, horizontal)
            vertical = _unit(_solve(gram_channels * _gram(horizontal), rows))
            columns = torch.einsum("hwr,hr->wr", right_side, vertical)
            spatial = [vertical, _unit(_solve(gram_channels * _gram(vertical), columns))]
        kernels = _kernels(spatial)
        contracted = (over_output @ output).view(in_channels, positions, rank)
        right_side = torch.einsum("isr,sr->ir", contracted, kernels)
        gram = _gram(output) * _gram(kernels)
        scaled = _solve(gram, right_side)
        error = float(1 - 2 * (scaled * right_side).sum() + (gram * _gram(scaled)).sum())
        if previous - error <= tolerance * error or error < torch.finfo(tensor.dtype).eps:
            break
        previous, input = error, _unit(scaled)
    return [output, scaled, *spatial]


def _orthogonal_iteration(
    tensor: Tensor, output_rank: int, input_rank: int, sweeps: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """HOOI from the HOSVD: orthonormal output [O, P], input [I, Q] and the core [P, Q, Kh, Kw]."""
    input = singular_vectors(tensor, 1, input_rank)
    previous = float("inf")
    for _ in range(sweeps):
        output = singular_vectors(torch.einsum("oihw,iq->oqhw", tensor, input), 0, output_rank)
        projected = torch.einsum("oihw,op->pihw", tensor, output)
        input = singular_vectors(projected, 1, input_rank)
        core = torch.einsum("pihw,iq->pqhw", projected, input)
        error = float(1 - core.square().sum())
        if previous - error <= tolerance * error:
            break
        previous = error
    return output, input, core


def singular_vectors(tensor: Tensor, mode: int, count: int) -> Tensor:
    """The `count` leading left singular vectors of one mode's unfolding."""
    return leading_left(tensor.movedim(mode, 0).flatten(1), count)


def leading_left(matrix: Tensor, count: int) -> Tensor:
    """The leading left singular vectors of matrices, from the eigenvectors of the smaller product with the transpose.

    Args:
        matrix: [..., n, m], float64.
        count: of vectors, at most n and m.

    Returns:
        [..., n, count], orthonormal columns; where the rank is less than `count`, any that complete them.
    """
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        return torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1)[..., :count]
    right = torch.linalg.eigh(matrix.mT @ matrix)[1].flip(-1)[..., :count]
    return torch.linalg.qr(matrix @ right)[0]


def _leading_columns(tensor: Tensor, mode: int, rank: int, generator: torch.Generator) -> Tensor:
    """Singular vectors of one mode, filled up with random unit columns to [n, rank]."""
    vectors = singular_vectors(tensor, mode, rank)
    missing = rank - vectors.shape[1]
    random = torch.randn(len(vectors), missing, generator=generator, dtype=tensor.dtype).to(tensor.device)
    return torch.cat([vectors, _unit(random)], dim=1)


def _kernels(spatial: list[Tensor]) -> Tensor:
    """The kernels [S, R] of the spatial factors: their column-wise Kronecker product."""
    if len(spatial) == 1:
        return spatial[0]
    return torch.einsum("hr,wr->hwr", *spatial).flatten(0, 1)


def _balance(factors: list[Tensor]) -> list[Tensor]:
    """The same terms in float32 with equal norms in all factors."""
    norms = [torch.linalg.vector_norm(factor, dim=0) for factor in factors]
    scale = torch.stack(norms).prod(dim=0).pow(1 / len(factors))
    return [(_unit(factor) * scale).float() for factor in factors]


def _unit(factor: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(factor, dim=0)
    return factor / norm.clamp_min(torch.finfo(norm.dtype).tiny)


def _gram(factor: Tensor) -> Tensor:
    return factor.mT @ factor


def _solve(gram: Tensor, right_side: Tensor) -> Tensor:
    """X [K, R] with X gram = right_side."""
    ridged = gram + RIDGE * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(ridged)
    return torch.cholesky_solve(right_side.mT, factor).mT
