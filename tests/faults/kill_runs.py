"""Kills a training run at random moments, over and over (`make faults`), and compares what comes out with a whole run.

Every child resumes where the last one was killed, by SIGKILL at a moment drawn from the time that a whole run takes; a
run that reached its end is compared and the next one begins.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.lib.cells import RESULTS, ResultCells, run, settings_of, tabulate
from norton_deploy.errors import UserError
from norton_deploy.training.settings import build_accelerator
from norton_deploy.training.trainer import Evaluation, Trainer
from tests.training.tiny_run import RandomImages, cross_entropy, tiny_model, tiny_settings


@dataclass(frozen=True)
class Settings:
    """Settings of `make faults`."""

    out: Path = RESULTS / "faults.json"
    """Results file; a Markdown table is written beside it."""
    kills: int = 50
    """Of all runs together, at least."""
    seed: int = 0
    """Of the moments."""


def main(settings: Settings) -> int:
    """Status 1 if a run came out otherwise."""
    results = ResultCells(settings.out, settings_of(settings), report)
    return results.measure_all({"training run": partial(kill_often, settings)})


def report(results: ResultCells) -> str:
    """Kills and faults."""
    return tabulate(
        "Runs killed at random moments and resumed, against a run that was never killed: weights bit for bit, lines of "
        "the log, files",
        results.cells.items(),
        {
            "What": lambda row: row[0],
            "Kills": lambda row: str(row[1]["kills"]),
            "Runs that ended": lambda row: str(row[1]["runs"]),
            "Seconds a run": lambda row: f"{row[1]['seconds_a_run']:.1f}",
            "Faults": lambda row: row[1].get("failure", "none"),
        },
    ).to_markdown()


def kill_often(settings: Settings) -> dict[str, Any]:
    """Kill, resume, compare."""
    drawn, kills, runs, faults = random.Random(settings.seed), 0, 0, []
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        started = time.monotonic()
        run_child(whole, False, None)
        whole_s = time.monotonic() - started
        while kills < settings.kills:
            out = Path(folder) / f"run{runs}"
            ended = False
            while not ended:
                resume = (out / "settings.json").exists()
                last = kills >= settings.kills
                ended = run_child(out, resume, None if last else drawn.uniform(0, whole_s))
                kills += not ended
            runs += 1
            faults += [f"{out.name}: {fault}" for fault in faults_of(out, whole)]
    found = {"kills": kills, "runs": runs, "seconds_a_run": round(whole_s, 2)}
    return found | {"failure": "; ".join(faults)} if faults else found


def train(out: Path, resume: bool) -> None:
    """The tiny run, as a command starts it; the state is big enough for a kill to hit its writing."""
    settings = tiny_settings(out, resume=resume)
    model = tiny_model()
    model.register_buffer("ballast", torch.zeros(2_000_000))
    Trainer(
        accelerator=build_accelerator(settings),
        model=model,
        loss_terms=cross_entropy,
        loader=RandomImages(settings.batch_size, 0, 1),
        settings=settings,
        evaluate=lambda trained: Evaluation({"weights": {"sum": float(next(trained.parameters()).abs().sum())}}, 0.0),
        save_model=lambda path, trained: torch.save(trained.state_dict(), path),
        identity={},
    ).start("random weights")


def run_child(out: Path, resume: bool, after_s: float | None) -> bool:
    """Train in a fork, killed after so many seconds; whether it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            train(out, resume)
        except UserError as error:
            print(error, file=sys.stderr)
            os._exit(1)
        os._exit(0)
    if after_s is not None:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with status {status}")
    return status == 0


def faults_of(out: Path, whole: Path) -> list[str]:
    """How a run that was killed and resumed differs from the one that was not."""
    ours, theirs = (torch.load(path / "state.pt", weights_only=True)["model"] for path in (out, whole))
    faults = [f"{name} differs" for name in theirs if not torch.equal(ours[name], theirs[name])]
    lines, expected = (
        [(line["section"], line["step"]) for line in map(json.loads, (path / "log.jsonl").read_text().splitlines())]
        for path in (out, whole)
    )
    if lines != expected:
        faults.append(f"the log has {lines}")
    left = {path.name for path in out.iterdir()} ^ {path.name for path in whole.iterdir()}
    return [*faults, *(f"{name} is left over or missing" for name in sorted(left))]


if __name__ == "__main__":
    run(Settings, main)
