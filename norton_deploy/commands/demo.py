"""The paper's detection experiment in small, on the embedded data: compress, fine-tune, train, evaluate, report.

Every step is one of the other commands, printed before it runs; a step that is done is not repeated. The first training
steps are timed, so that the demo says how long it will take here and fits into --minutes.
"""

import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from norton_deploy.commands import command_line, run, write_json
from norton_deploy.config import from_mapping, parse_settings
from norton_deploy.errors import INTERRUPTED, UserError
from norton_deploy.files import read_json, sha256_of
from norton_deploy.reporting.demo import write_demo_report
from norton_deploy.structures import Task
from norton_deploy.training.run_log import read_log

CONFIGS = Path("configs")
CROPS_A_STEP, SCENES_A_STEP = 32, 4
"""Batch sizes in configs/train/demo_*.yaml."""
DATA_STEPS = 2
"""The first steps, after which there is something to train on."""
PROBE = {"--steps": "4", "--log-every": "1", "--workers": "0"}
SMALL_SHARE = 0.65
"""Of a dense step's time that a compressed one takes: 0.64 and 0.59 in benchmarks/results/demo.json."""
FIXED_S = 190.0
"""Set aside for drawing, compression, evaluation, latency and report."""
FEWEST_STEPS = 50


@dataclass(frozen=True)
class Settings:
    """Settings of tools/demo.py."""

    out: Path = Path("runs/demo")
    """Folder for the data, the models and the report."""
    task: Task = "box"
    """Detector to train: box, mask or keypoint."""
    plan: Path = CONFIGS / "plans" / "table3.yaml"
    """Plan that the backbone is compressed by."""
    train_images: int = 1400
    """Training images to draw."""
    val_images: int = 200
    """Held-out images to draw."""
    pretrain_steps: int = 160
    """Steps of 32 object crops that pretrain the dense ResNet-50, the stand-in for ImageNet."""
    finetune_steps: int = 60
    """Steps of 32 object crops that the compressed ResNet-50 is fine-tuned for."""
    detector_steps: int = 450
    """Steps of 4 images that the dense and the compressed detector are trained for, each, at most."""
    minutes: float = 15.0
    """Train the detectors for fewer steps where everything would take longer than so many minutes on this machine."""
    seed: int = 0
    """Seed of the data and of the training."""


@dataclass(frozen=True)
class Step:
    """One command of the demo. `product` is what it writes last, of a training run its folder."""

    title: str
    command: str
    arguments: tuple[str, ...]
    product: Path

    def run(self, root: Path) -> None:
        """Run the command, unless it has been run with these arguments (and contents of YAML files among them) and its
        product is there; a training run goes on from its last state.

        Args:
            root: folder below which all steps write; the records (command, seconds) are in root/steps.

        Raises:
            UserError: it has been run with other arguments or contents, or fails.
            KeyboardInterrupt: it was interrupted.
        """
        argv, product = self.arguments, self.product
        once: tuple[str, ...] = ()
        if self.command.startswith("train_"):
            folder, product = product, product / "metrics.json"
            argv = (*argv, "--out", str(folder), "--json", str(product))
            if (folder / "settings.json").is_file():
                once = ("--resume" if (folder / "state.pt").is_file() else "--overwrite",)
        command = f"norton {self.command} {shlex.join(argv)}"
        record = root / "steps" / f"{product.relative_to(root).as_posix()}.json"
        contents = {
            argument: sha256_of(argument)
            for option, argument in pairwise(["", *argv])
            if argument.endswith(".yaml") and option != "--out" and Path(argument).is_file()
        }
        if record.is_file() and product.exists():
            before = read_json(record, "a step's record")
            same = isinstance(before, dict) and before.get("command") == command
            if not same or before.get("contents", contents) != contents:
                raise UserError(
                    f"{product}: was made by another command or other YAML files (see {record}); choose another "
                    f"folder, or delete {root}"
                )
            print(f"\n{self.title}: done already", flush=True)
            return
        if self.command == "compress" and product.exists():  # interrupted before it was recorded
            once = ("--overwrite",)
        print(f"\n{self.title}\n$ {command}", flush=True)
        started = time.perf_counter()
        status = run(self.command, [*argv, *once])
        if status == INTERRUPTED:
            raise KeyboardInterrupt
        if status:
            raise UserError(f"failed: {command}")
        seconds = round(time.perf_counter() - started, 1)
        write_json({"title": self.title, "command": command, "contents": contents, "seconds": seconds}, record)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="demo", description=__doc__ or "")
    if not settings.plan.is_file() or not CONFIGS.is_dir():
        raise UserError(f"{settings.plan}: not found; run the demo from the repository's root folder")
    steps, started = demo_steps(settings), time.perf_counter()
    for number in range(len(steps)):
        if number == DATA_STEPS:
            settings = fitted(settings, step_times(settings))
            steps = demo_steps(settings)
        replace(steps[number], title=f"[{number + 1}/{len(steps) + 1}] {steps[number].title}").run(settings.out)
    print(f"\n[{len(steps) + 1}/{len(steps) + 1}] AP, latency, report", flush=True)
    report = write_demo_report(
        settings.out,
        settings.task,
        dense=settings.out / "detector-dense",
        compressed=settings.out / "detector-norton",
        data=settings.out / "data",
        command=command_line("demo", argv),
    )
    print(f"\n{report} (this run took {(time.perf_counter() - started) / 60:.1f} minutes)")
    return 0


@dataclass(frozen=True)
class StepTimes:
    """Attributes: seconds of a training step of the dense classifier and of the dense detector on this machine."""

    classifier: float
    detector: float


def step_times(settings: Settings) -> StepTimes:
    """Of the first steps of either training, with random weights in a folder that is removed again; measured once."""
    record = settings.out / "times.json"
    if record.is_file():
        return from_mapping(StepTimes, read_json(record, "times of the demo's steps"), str(record))
    print("\ntime the first steps of both trainings", flush=True)
    times = StepTimes(*(_seconds_a_step(demo_steps(settings)[index], settings.out / "probe") for index in (2, 5)))
    write_json(vars(times), record)
    return times


def _seconds_a_step(step: Step, out: Path) -> float:
    arguments = dict(zip(step.arguments[::2], step.arguments[1::2], strict=True)) | PROBE
    arguments.pop("--init", None)
    if step.command == "train_det":
        arguments["--evaluation-images"] = "1"
    words = [word for pair in arguments.items() for word in pair]
    if run(step.command, [*words, "--out", str(out), "--no-progress", "--overwrite"]):
        raise UserError(f"failed: norton {step.command} {shlex.join(words)}")
    lines = [line for line in read_log(out / "log.jsonl") if line["section"] == "train"]
    images = {"train_cls": CROPS_A_STEP, "train_det": SCENES_A_STEP}[step.command]
    shutil.rmtree(out)
    return float(min(images / line["images_per_s"] for line in lines[1:]))


def fitted(settings: Settings, times: StepTimes) -> Settings:
    """The settings with as many detector steps as --minutes allow, and how long that will take, said."""
    before = FIXED_S + times.classifier * (settings.pretrain_steps + SMALL_SHARE * settings.finetune_steps)
    both = times.detector * (1 + SMALL_SHARE)
    fitting = int((60 * settings.minutes - before) / both) // 10 * 10
    steps = min(settings.detector_steps, max(FEWEST_STEPS, fitting))
    takes, all_take = ((before + count * both) / 60 for count in (steps, settings.detector_steps))
    said = f"{times.classifier:.2f} s a pretraining step, {times.detector:.2f} s a detector step: about {takes:.0f} min"
    if steps < settings.detector_steps:
        said += f" with {steps} detector steps; --minutes {all_take + 1:.0f} allows {settings.detector_steps}"
    print(f"on this machine {said}", flush=True)
    return replace(settings, detector_steps=steps)


def demo_steps(settings: Settings) -> list[Step]:
    """The commands of the whole experiment, in order."""
    out, seed = settings.out, str(settings.seed)
    data, crops = out / "data", out / "crops"
    dense_body, small_body = out / "pretrain", out / "finetune"

    def classifier(title: str, folder: Path, steps: int, *initial: str) -> Step:
        config = str(CONFIGS / "train" / "demo_cls.yaml")
        arguments = ("--config", config, "--data", str(crops), "--steps", str(steps), "--seed", seed, *initial)
        return Step(title, "train_cls", arguments, folder)

    def detector(title: str, folder: Path, body: Path) -> Step:
        config = str(CONFIGS / "train" / f"demo_{settings.task}.yaml")
        arguments = ("--config", config, "--data", str(data), "--steps", str(settings.detector_steps), "--seed", seed)
        return Step(title, "train_det", (*arguments, "--init", str(body / "last.safetensors")), folder)

    compressed = out / "compressed.safetensors"
    return [
        Step(
            "draw the embedded dataset",
            "make_synthetic",
            (
                *("--out", str(data), "--train", str(settings.train_images), "--val", str(settings.val_images)),
                *("--seed", seed, "--min-size", "160", "--max-size", "224"),
            ),
            data / "annotations" / "instances_val2017.json",
        ),
        Step("cut object crops out", "make_crops", ("--data", str(data), "--out", str(crops)), crops / "val"),
        classifier("pretrain ResNet-50 on the crops", dense_body, settings.pretrain_steps),
        Step(
            "compress it",
            "compress",
            (
                *("--model", str(dense_body / "last.safetensors"), "--plan", str(settings.plan)),
                *("--out", str(compressed)),
            ),
            compressed,
        ),
        classifier(
            "fine-tune the compressed ResNet-50", small_body, settings.finetune_steps, "--init", str(compressed)
        ),
        detector("train the dense detector", out / "detector-dense", dense_body),
        detector("train the compressed detector", out / "detector-norton", small_body),
    ]
