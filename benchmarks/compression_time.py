"""Time of compressing one layer: our CPD of all filters against tensorly, our distances against a loop over pairs.

Everything is timed in one process, our call and theirs in turn, call k of both on the same weights. Tensorly's
`parafac` (NumPy backend, default settings) takes one filter at a time, so it runs on a sample of the layer's
filters, another one in each round, and its time is extrapolated to the layer by their number; so is the time of
the loop over pairs, which calls SciPy's `subspace_angles` once per mode. NMSE is compared on the sampled filters.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import subspace_angles
from tensorly import cp_to_tensor
from tensorly.decomposition import parafac
from torch import Tensor

from benchmarks.lib.cells import RESULTS, ResultCells, interval, page, run, settings_of, spread, tabulate
from norton_deploy.cost.turns import paired_speedup, time_in_turns
from norton_deploy.method.cp import CPFactors, decompose_filters, layer_nmse, nmse
from norton_deploy.method.filter_selection import pabs_distance, select_filters

STRUCTURED_TERMS = (1.0, 0.7, 0.5, 0.3, 0.2)
STRUCTURED_NOISE = 0.3
Weights = Callable[[], dict[str, Tensor]]


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/compression_time.py."""

    filters: int = 512
    """Filters of the layer."""
    channels: int = 512
    """Input channels of the layer."""
    kernel: int = 3
    """Height and width of the kernels."""
    ranks: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
    """Ranks to decompose at."""
    rounds: int = 6
    """Timed calls of each method, after one that is not timed."""
    sample: int = 10
    """Filters per round that tensorly decomposes."""
    pairs: int = 200
    """Pairs of filters per round that the loop measures."""
    out: Path = RESULTS / "compression_time.json"
    """Results; Markdown tables are written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    weights = cache(partial(layers, settings))
    cells: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind in ("he", "structured"):
        for rank in settings.ranks:
            cells[f"{kind}, rank {rank}"] = partial(time_decomposition, weights, kind, rank, settings)
    for rank in settings.ranks:
        cells[f"distances, rank {rank}"] = partial(time_distance, weights, rank, settings)
    return ResultCells(settings.out, settings_of(settings, "ranks"), report).measure_all(cells)


def report(results: ResultCells) -> str:
    """Decomposition and distances, a row for each rank; figures of tensorly and of the loop are extrapolated."""
    layer = "{filters} filters of {channels} x {kernel} x {kernel}".format(**results.settings)

    def ms(name: str) -> Callable[[Mapping[str, Any]], str]:
        return lambda cell: f"{cell[name]['median']:.0f}"

    return page(
        tabulate(
            f"Decomposing {layer}: all filters at once against tensorly's parafac, extrapolated from a sample",
            [cell for cell in results.cells.values() if "weights" in cell],
            {
                "Weights": lambda cell: cell["weights"],
                "Rank": lambda cell: str(cell["rank"]),
                "ms": ms("ours_ms"),
                "tensorly ms": ms("tensorly_ms"),
                "times faster": lambda cell: interval(cell["speedup"], 0),
                "NMSE / tensorly's": lambda cell: f"{cell['nmse_sample'] / cell['tensorly_nmse_sample']:.4f}",
            },
        ),
        tabulate(
            f"PABS between all pairs of {layer} against SciPy pair by pair, extrapolated from a sample",
            [cell for cell in results.cells.values() if "weights" not in cell],
            {
                "Rank": lambda cell: str(cell["rank"]),
                "ms": ms("ours_ms"),
                "loop ms": ms("loop_ms"),
                "times faster": lambda cell: interval(cell["speedup"], 0),
                "largest difference, rad": lambda cell: f"{cell['largest_difference_rad']:.1e}",
                "Algorithm 1, ms": ms("algorithm_1_ms"),
            },
        ),
    )


def layers(settings: Settings) -> dict[str, Tensor]:
    """ "he": white noise of He's variance; "structured": five terms per filter under white noise of 30 %."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.filters, settings.channels, settings.kernel, settings.kernel)
    he = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
    sizes = (settings.kernel, settings.kernel, settings.channels)
    A, B, C = (torch.randn(settings.filters, size, 5, generator=generator) for size in sizes)
    clean = CPFactors(A, B, C * torch.tensor(STRUCTURED_TERMS)).reconstruct()
    return {"he": he, "structured": clean + STRUCTURED_NOISE * clean.std() * torch.randn(shape, generator=generator)}


def time_decomposition(weights: Weights, kind: str, rank: int, settings: Settings) -> dict[str, Any]:
    """Whole layer at once against one filter at a time, and both errors on the same filters."""
    weight = weights()[kind]
    factors = decompose_filters(weight, rank)
    found: dict[int, tuple[list[int], list[Any]]] = {}

    def tensorly(step: int) -> None:
        chosen = [(step * settings.sample + k) % settings.filters for k in range(settings.sample)]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Trying to compute SVD")
            found[step] = chosen, [parafac(filter_, rank, random_state=0) for filter_ in weight[chosen].numpy()]

    calls = {"ours": lambda _: decompose_filters(weight, rank), "tensorly": tensorly}
    turns = time_in_turns(calls, rounds=settings.rounds, warm_up=1)
    theirs_ms = turns.of("tensorly") * settings.filters / settings.sample
    ours_nmse, theirs_nmse = [], []
    for chosen, decomposed in (found[step] for step in range(settings.rounds)):
        ours_nmse += nmse(weight, factors)[chosen].tolist()
        for filter_, terms in zip(weight[chosen].numpy(), decomposed, strict=True):
            theirs_nmse.append(((filter_ - cp_to_tensor(terms)) ** 2).sum() / (filter_**2).sum())
    return {
        "weights": kind,
        "rank": rank,
        "ours_ms": spread(turns.of("ours").tolist()),
        "tensorly_ms": spread(theirs_ms.tolist()),
        "speedup": paired_speedup(theirs_ms, turns.of("ours")).to_dict(),
        "nmse_layer": layer_nmse(weight, factors),
        "nmse_sample": float(np.mean(ours_nmse)),
        "tensorly_nmse_sample": float(np.mean(theirs_nmse)),
        "sampled_filters": len(theirs_nmse),
    }


def time_distance(weights: Weights, rank: int, settings: Settings) -> dict[str, Any]:
    """All pairs at once (eq. 11) against SciPy pair by pair, the largest difference, and Algorithm 1."""
    factors = decompose_filters(weights()["he"], rank)
    modes = [part.double().numpy() for part in (factors.A, factors.B, factors.C)]
    rng = np.random.default_rng(0)
    distance, keep = pabs_distance(factors), settings.filters // 4
    differences: list[float] = []

    def loop(_: int) -> None:
        for i, j in (rng.choice(settings.filters, 2, replace=False) for _ in range(settings.pairs)):
            angle = sum(subspace_angles(mode[i], mode[j])[0] for mode in modes) / 3
            differences.append(abs(float(distance[i, j]) - angle))

    calls = {
        "ours": lambda _: pabs_distance(factors),
        "loop": loop,
        "algorithm 1": lambda _: select_filters(distance, keep),
    }
    turns = time_in_turns(calls, rounds=settings.rounds, warm_up=1)
    loop_ms = turns.of("loop") * settings.filters * (settings.filters - 1) / 2 / settings.pairs
    return {
        "rank": rank,
        "ours_ms": spread(turns.of("ours").tolist()),
        "loop_ms": spread(loop_ms.tolist()),
        "speedup": paired_speedup(loop_ms, turns.of("ours")).to_dict(),
        "largest_difference_rad": max(differences),
        "algorithm_1_ms": spread(turns.of("algorithm 1").tolist()),
        "algorithm_1_keep": keep,
    }


if __name__ == "__main__":
    run(Settings, main)
