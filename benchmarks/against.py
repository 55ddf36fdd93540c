"""Graphs that an older commit exported beside today's, all in turn in ONNX Runtime: has what runs on a CPU got slower?

    git worktree add OLD COMMIT        # then in OLD, and here, for each task, dense and with the plan `fast`:
    tools/export_onnx.py --task mask [--plan configs/plans/fast.yaml] --image-size 800 800 --out FOLDER/mask_fast.onnx
    python benchmarks/against.py --commit COMMIT --old OLD_FOLDER --new NEW_FOLDER

Both commits draw the same random weights. What is timed is the graph alone, on one drawn scene, without the predictor
around it: graphs of other versions have other contracts. Before that both run once, and what they found is compared.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lib.cells import RESULTS, ResultCells, interval, run, settings_of, tabulate
from norton_deploy.cost.session import make_session
from norton_deploy.cost.turns import time_in_turns
from norton_deploy.data.synthetic import draw_scene
from norton_deploy.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/against.py."""

    commit: str
    """That made the older graphs."""
    old: Path
    """Folder of its graphs."""
    new: Path
    """Folder of today's graphs, of the same names."""
    rounds: int = 12
    """Calls of each."""
    out: Path = RESULTS / "against.json"
    """Results file; a Markdown table is written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    names = sorted(file.stem for file in settings.new.glob("*.onnx") if (settings.old / file.name).is_file())
    if not names:
        raise UserError(f"{settings.new}: no graph (.onnx) that has its like in {settings.old}")
    results = ResultCells(settings.out, settings_of(settings, "old", "new"), report)
    return results.measure_all({name: partial(measure, settings, f"{name}.onnx") for name in names})


def report(results: ResultCells) -> str:
    """Medians, file sizes and the paired ratio of each graph."""
    return tabulate(
        f"Milliseconds a call of the graphs of {results.settings['commit']} and of this commit, medians, and the "
        "paired ratio with its 95 % interval: above 1 this commit's are quicker",
        results.cells.items(),
        {
            "Graph": lambda row: row[0].replace("_", " "),
            "older, ms": lambda row: f"{row[1]['old']['p50_ms']:.0f}",
            "now, ms": lambda row: f"{row[1]['new']['p50_ms']:.0f}",
            "Ratio": lambda row: interval(row[1]["speedup"]),
            "older, MB": lambda row: f"{row[1]['old']['bytes'] / 1e6:.1f}",
            "now, MB": lambda row: f"{row[1]['new']['bytes'] / 1e6:.1f}",
            "Detections": lambda row: f"{row[1]['old']['detections']}, {row[1]['new']['detections']}",
        },
    ).to_markdown()


def measure(settings: Settings, name: str) -> dict[str, Any]:
    """Both graphs in turn on the same scene."""
    files = {"old": settings.old / name, "new": settings.new / name}
    calls = {which: call_of(file) for which, file in files.items()}
    found = {which: int(np.sum(call(0)["num_detections"])) for which, call in calls.items()}
    turns = time_in_turns(calls, rounds=settings.rounds)
    return {
        **{
            which: turns.summary(which).to_dict() | {"bytes": file.stat().st_size, "detections": found[which]}
            for which, file in files.items()
        },
        "speedup": turns.speedup("old", "new").to_dict(),
    }


def call_of(file: Path) -> Callable[[int], dict[str, Any]]:
    """Runs a graph of one image, uint8 [1, H, W, 3], on a drawn scene."""
    session = make_session(file, "cpu")
    [given], names = session.get_inputs(), [output.name for output in session.get_outputs()]
    frame = draw_scene(0, tuple(given.shape[1:3])).image[None]

    def call(_round: int) -> dict[str, Any]:
        return dict(zip(names, session.run(names, {given.name: frame}), strict=True))

    return call


if __name__ == "__main__":
    run(Settings, main)
