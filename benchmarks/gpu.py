"""Right and fast on one CUDA GPU, in one command: torch 2.11 or newer, no network, no ONNX Runtime, no TensorRT.

    python benchmarks/gpu.py --prepare FOLDER                    # on any machine, seconds: scenes and CPU references
    python benchmarks/gpu.py --prepared FOLDER --budget 330      # on the GPU
    python benchmarks/gpu.py --device cpu --smoke --out FILE     # every cell, tiny, where there is no GPU

Cells are independent and run in order of worth. A finished cell is written at once and is not run again with the same
--out; a failed one leaves its error and is tried again. Weights are random (structures of the plans, calibrated) but
for correctness: these are times, not accuracies. Times are from an idle device to an idle device on the host's clock.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

STARTED = time.monotonic()  # before torch is imported, whose start counts towards --budget; hence E402 below

import torch  # noqa: E402

from benchmarks.lib.cells import RESULTS, ResultCells, run  # noqa: E402
from benchmarks.lib.gpu_bench import Bench, Skipped  # noqa: E402
from benchmarks.lib.gpu_report import report  # noqa: E402
from norton_deploy.errors import UserError  # noqa: E402
from norton_deploy.structures import TASKS  # noqa: E402

GRACE = 1.5
"""A cell is stopped when it has taken this many times its budget, but for --smoke."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/gpu.py."""

    prepare: Path | None = None
    """Write scenes and CPU references into this folder, and do nothing else."""
    prepared: Path | None = None
    """Folder that --prepare wrote; without it the references are made where the benchmark runs."""
    device: str = "cuda"
    """cuda or cpu; cells that need a GPU are skipped on a cpu."""
    smoke: bool = False
    """Everything tiny, to see that each cell runs."""
    budget: float = 330.0
    """Seconds for everything, from the start of the process."""
    cells: tuple[str, ...] = ()
    """Only these cells; empty: all."""
    out: Path = RESULTS / "gpu.json"
    """Results file; a Markdown report is written beside it."""
    keep_errors: bool = False
    """Don't try cells again that failed."""


def cell_list() -> dict[str, tuple[float, Callable[[Bench], dict[str, Any]]]]:
    """Name -> seconds on an H100 and the call, in order of worth."""
    from benchmarks.lib import gpu_detectors, gpu_engines, gpu_operators, gpu_training

    return {
        "environment": (10, gpu_detectors.environment),
        "captures": (32, gpu_detectors.captures),
        "correctness": (35, gpu_detectors.correctness),
        **{f"table3 {task}": (32, partial(gpu_detectors.table3, task=task)) for task in TASKS},
        "end to end": (32, gpu_detectors.end_to_end),
        "engine": (20, gpu_engines.engine),
        "kernels": (12, gpu_detectors.kernels),
        "operators": (20, gpu_operators.operators),
        "training": (32, gpu_training.training),
        "forms": (16, gpu_operators.forms),
        "compiled": (120, gpu_operators.compiled),
        "package": (200, gpu_engines.package),
    }


def main(settings: Settings) -> int:
    """Run what is missing; 1 if a cell failed."""
    if settings.prepare is not None:
        from benchmarks.lib.gpu_parity import prepare

        prepare(settings.prepare)
        return 0
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: there is no CUDA GPU that works here; --device cpu --smoke tries the benchmark out"
        )
    results = ResultCells(settings.out, {"device": settings.device, "smoke": settings.smoke}, report)
    cells = results.cells
    bench = Bench(torch.device(settings.device), settings.smoke, settings.prepared)
    rates = cells.get("environment", {}).get("result", {}).get("rates")
    bench.rates |= rates or {}
    for plan in ("dense", *bench.plans):
        for task in bench.tasks:
            bench.start(task, plan)
    if bench.on_gpu:
        torch.backends.cudnn.benchmark_limit = 6  # algorithms that are tried for each convolution
    print(f"started in {time.monotonic() - STARTED:.1f} s", flush=True)
    for name, (seconds, measure) in cell_list().items():
        done = cells.get(name, {}).get("status")
        if (settings.cells and name not in settings.cells) or done in ("done", "skipped"):
            continue
        left = settings.budget - (time.monotonic() - STARTED)
        if (done == "failed" and settings.keep_errors) or left < 5:
            print(f"{name}: not run, {left:.0f} s are left", flush=True)
            continue
        measured = partial(run_cell, bench, measure, min(seconds, left - 3), left - 2)
        cell = results.measure(name, measured, again=True)
        print(f"{name}: {cell['status']}, {cell['seconds']:.1f} s {cell.get('why', '')}", flush=True)
        if cell["status"] == "failed" and not device_works(bench):
            restart(settings)
    bench.pool.shutdown(wait=False, cancel_futures=True)
    print(report(results), flush=True)
    return int(any(cell["status"] == "failed" for cell in cells.values()))


def run_cell(bench: Bench, measure: Callable[[Bench], dict[str, Any]], seconds: float, left: float) -> dict[str, Any]:
    """What a cell found, or why it did not; it is interrupted when it takes far too long."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {time.monotonic() - started:.0f} s; its budget is {seconds:.0f}")

    started = time.monotonic()
    bench.ends, bench.partial = started + seconds, {}
    signal.signal(signal.SIGALRM, stop)
    # seconds are an H100's: on a CPU a cell may take all that is left
    limit = left if bench.smoke else min(GRACE * seconds + 5, left)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, limit))
    cell: dict[str, Any]
    try:
        cell = {"status": "done", "result": measure(bench)}
        bench.synchronise()
    except Skipped as reason:
        cell = {"status": "skipped", "why": str(reason)}
    except Exception as error:
        cell = {
            "status": "failed",
            "why": f"{type(error).__name__}: {error}"[:2000],
            "trace": traceback.format_exc()[-4000:],
            "partial": bench.partial,
        }
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if bench.on_gpu:
        cell["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return cell | {"budget_s": seconds}


def device_works(bench: Bench) -> bool:
    """Whether the GPU still answers: after an illegal access nothing does until the process ends."""
    try:
        bench.synchronise()
        return float(torch.ones(2, device=bench.device).sum()) == 2.0
    except Exception:
        return False


def restart(settings: Settings) -> None:
    """The same command in place of this process, with the time that is left."""
    print("the GPU does not answer any more: starting anew", flush=True)
    left = settings.budget - (time.monotonic() - STARTED)
    os.execv(sys.executable, [sys.executable, *sys.argv, "--budget", str(left), "--keep-errors"])


if __name__ == "__main__":
    run(Settings, main)
