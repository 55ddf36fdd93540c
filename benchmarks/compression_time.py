"""Time of compressing one layer: our CPD of all filters against tensorly, our distances against a loop over pairs.

Everything is timed in one process, our call and theirs in turn, call k of both on the same weights. Tensorly's
`parafac` (NumPy backend, default settings) takes one filter at a time, so it runs on a sample of the layer's
filters, another one in each round, and its time is extrapolated to the layer by their number; so is the time of
the loop over pairs, which calls SciPy's `subspace_angles` once per mode. NMSE is compared on the sampled filters.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg import subspace_angles
from tensorly import cp_to_tensor
from tensorly.decomposition import parafac
from torch import Tensor

from norton_deploy import commands
from norton_deploy.config import parse_settings
from norton_deploy.files import atomic_write
from norton_deploy.method.cp import CPFactors, decompose_filters, layer_nmse, nmse
from norton_deploy.method.filter_selection import select_filters
from norton_deploy.method.subspace_angles import pabs_distance
from norton_deploy.reporting.latency import paired_speedup, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.reporting.tables import Table

STRUCTURED_TERMS = (1.0, 0.7, 0.5, 0.3, 0.2)
STRUCTURED_NOISE = 0.3


@dataclass
class Settings:
    """Settings of the benchmark."""

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
    out: Path = Path(__file__).parent / "results" / "compression_time.json"
    """Results; '-' for the screen."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write the results."""
    settings = parse_settings(Settings, argv, prog="compression_time", description=__doc__ or "")
    record = provenance()
    record["versions"] |= {name: version(name) for name in ("tensorly", "scipy")}
    results: dict[str, Any] = {
        "provenance": record,
        "settings": {name: value for name, value in asdict(settings).items() if name != "out"},
        "extrapolated": "tensorly_ms from the sampled filters and loop_ms from the sampled pairs, by their number",
        "decomposition": [],
        "distance": [],
    }
    for kind, weight in layers(settings).items():
        for rank in settings.ranks:
            results["decomposition"].append(row := time_decomposition(weight, rank, settings) | {"weights": kind})
            ratio, error = row["speedup"]["ratio"], row["nmse_sample"] / row["tensorly_nmse_sample"]
            print(f"{kind} rank {rank}: {ratio:.0f} times tensorly, NMSE {error:.4f} of its", file=sys.stderr)
            if kind == "he":
                results["distance"].append(row := time_distance(weight, rank, settings))
                ratio = row["speedup"]["ratio"]
                print(
                    f"distances rank {rank}: {row['ours_ms']['median']:.0f} ms, {ratio:.0f} times a loop",
                    file=sys.stderr,
                )
    commands.write_json(results, settings.out)
    if str(settings.out) != "-":
        with atomic_write(settings.out.with_suffix(".md"), "w") as stream:
            stream.write("\n\n".join(table.to_markdown() for table in tables(results)) + "\n")
    return 0


def tables(results: dict[str, Any]) -> list[Table]:
    """Decomposition and distances, a row for each rank."""
    settings = results["settings"]
    layer = f"{settings['filters']} filters of {settings['channels']} x {settings['kernel']} x {settings['kernel']}"
    decomposition = tuple(
        (
            row["weights"],
            str(row["rank"]),
            f"{row['ours_ms']['median']:.0f}",
            f"{row['tensorly_ms']['median']:.0f}",
            interval(row["speedup"]),
            f"{row['nmse_sample'] / row['tensorly_nmse_sample']:.4f}",
        )
        for row in results["decomposition"]
    )
    distance = tuple(
        (
            str(row["rank"]),
            f"{row['ours_ms']['median']:.0f}",
            f"{row['loop_ms']['median']:.0f}",
            interval(row["speedup"]),
            f"{row['largest_difference_rad']:.1e}",
            f"{row['algorithm_1_ms']['median']:.0f}",
        )
        for row in results["distance"]
    )
    return [
        Table(
            ("Weights", "Rank", "ms", "tensorly ms", "times faster", "NMSE / tensorly's"),
            decomposition,
            f"Decomposing {layer}: all filters at once against tensorly's parafac, extrapolated from a sample",
        ),
        Table(
            ("Rank", "ms", "loop ms", "times faster", "largest difference, rad", "Algorithm 1, ms"),
            distance,
            f"PABS between all pairs of {layer} against SciPy pair by pair, extrapolated from a sample",
        ),
    ]


def interval(speedup: dict[str, float]) -> str:
    """Median ratio and its 95 % interval."""
    return f"{speedup['ratio']:.0f} ({speedup['low']:.0f} to {speedup['high']:.0f})"


def layers(settings: Settings) -> dict[str, Tensor]:
    """ "he": white noise of He's variance; "structured": five terms per filter under white noise of 30 %."""
    generator = torch.Generator().manual_seed(0)
    shape = (settings.filters, settings.channels, settings.kernel, settings.kernel)
    he = torch.randn(shape, generator=generator) * (2 / np.prod(shape[1:])) ** 0.5
    sizes = (settings.kernel, settings.kernel, settings.channels)
    A, B, C = (torch.randn(settings.filters, size, 5, generator=generator) for size in sizes)
    clean = CPFactors(A, B, C * torch.tensor(STRUCTURED_TERMS)).reconstruct()
    return {"he": he, "structured": clean + STRUCTURED_NOISE * clean.std() * torch.randn(shape, generator=generator)}


def time_decomposition(weight: Tensor, rank: int, settings: Settings) -> dict[str, Any]:
    """Whole layer at once against one filter at a time, and both errors on the same filters."""
    ours_ms, theirs_ms, ours_nmse, theirs_nmse = [], [], [], []
    factors = decompose_filters(weight, rank)
    for step in range(settings.rounds):
        chosen = [(step * settings.sample + k) % settings.filters for k in range(settings.sample)]
        ours_ms.append(milliseconds(lambda: decompose_filters(weight, rank)))
        elapsed_ms = 0.0
        for filter_ in weight[chosen].numpy():
            start = time.perf_counter()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Trying to compute SVD")
                found = parafac(filter_, rank, random_state=0)
            elapsed_ms += 1e3 * (time.perf_counter() - start)
            theirs_nmse.append(((filter_ - cp_to_tensor(found)) ** 2).sum() / (filter_**2).sum())
        theirs_ms.append(elapsed_ms * settings.filters / settings.sample)
        ours_nmse += nmse(weight, factors)[chosen].tolist()
    return {
        "rank": rank,
        "ours_ms": spread(ours_ms),
        "tensorly_ms": spread(theirs_ms),
        "speedup": summary_to_dict(paired_speedup(theirs_ms, ours_ms)),
        "nmse_layer": layer_nmse(weight, factors),
        "nmse_sample": float(np.mean(ours_nmse)),
        "tensorly_nmse_sample": float(np.mean(theirs_nmse)),
        "sampled_filters": len(theirs_nmse),
    }


def time_distance(weight: Tensor, rank: int, settings: Settings) -> dict[str, Any]:
    """All pairs at once (eq. 11) against SciPy pair by pair, the largest difference, and Algorithm 1."""
    factors = decompose_filters(weight, rank)
    A, B, C = (part.double().numpy() for part in (factors.A, factors.B, factors.C))
    rng = np.random.default_rng(0)
    distance = pabs_distance(factors)
    ours_ms, loop_ms, difference = [], [], 0.0
    all_pairs = settings.filters * (settings.filters - 1) / 2
    for _ in range(settings.rounds):
        ours_ms.append(milliseconds(lambda: pabs_distance(factors)))
        pairs = [rng.choice(settings.filters, 2, replace=False) for _ in range(settings.pairs)]
        start = time.perf_counter()
        found = [sum(subspace_angles(mode[i], mode[j])[0] for mode in (A, B, C)) / 3 for i, j in pairs]
        loop_ms.append(1e3 * (time.perf_counter() - start) * all_pairs / settings.pairs)
        differences = [abs(float(distance[i, j]) - value) for (i, j), value in zip(pairs, found, strict=True)]
        difference = max(difference, *differences)
    keep = settings.filters // 4
    return {
        "rank": rank,
        "ours_ms": spread(ours_ms),
        "loop_ms": spread(loop_ms),
        "speedup": summary_to_dict(paired_speedup(loop_ms, ours_ms)),
        "largest_difference_rad": difference,
        "algorithm_1_ms": spread(
            [milliseconds(lambda: select_filters(distance, keep)) for _ in range(settings.rounds)]
        ),
        "algorithm_1_keep": keep,
    }


def milliseconds(call: Callable[[], object]) -> float:
    """Time of one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": float(np.median(times_ms)), "min": min(times_ms), "max": max(times_ms)}


if __name__ == "__main__":
    raise SystemExit(main())
