"""Table III's accuracy on the embedded data: dense and compressed detectors with equal training.

One ResNet-50 per seed is pretrained on object crops. Per task and seed, a dense detector starts from it and is
trained for --detector-steps. Every plan then compresses that trained detector, which is fine-tuned for
--finetune-steps, with and without distillation. The control is the dense detector trained on for --finetune-steps
with the same recipe and learning rate: it has seen as many images as each compressed one, and it is the teacher.

Every cell is the project's own commands, called in this process with run folders under --work; whatever is done
already is not done again, so the benchmark may be stopped at any time, and --tasks, --plans, --seeds,
--finetune-steps, --finetune-lr and --distillation-weights may be worked through in any order into one results file.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.lib.narrow_plan import narrow_plan
from benchmarks.lib.table3_accuracy import DENSE, TRAINED, accuracy_report
from norton_deploy import commands
from norton_deploy.checkpoints.checkpoint import load_checkpoint
from norton_deploy.commands.demo import Steps
from norton_deploy.config import parse_settings
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.data.image_folder import find_images
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.inference.loading import load_predictor
from norton_deploy.inference.predictor import Predictor
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.reporting.latency import measure_alternating, summary_to_dict
from norton_deploy.reporting.provenance import provenance
from norton_deploy.structures import TASKS, Task

RESULTS = Path(__file__).parent / "results"
CONFIGS = Path("configs")
FINETUNE_SEED = 1000
"""Added to the seed after the first phase, so that the second sees the images in another order."""
SHARED = ("train_images", "val_images", "pretrain_steps", "recovery")
"""Settings that all cells of a results file have in common."""
GRAPH_SIZE = (192, 192)


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/table3_accuracy.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plans: tuple[str, ...] = ("table3", "balanced", "fast")
    """Which plans of configs/plans/."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the training; the data are the same for all."""
    train_images: int = 4000
    """Training images to draw."""
    val_images: int = 500
    """Held-out images to draw."""
    pretrain_steps: int = 300
    """Steps of 32 object crops that pretrain the ResNet-50, the stand-in for ImageNet."""
    detector_steps: int = 1200
    """Steps of 4 images that train the dense detector of a task; keypoints need more than boxes."""
    finetune_steps: int = 600
    """Steps of 4 images for every compressed detector, and for the dense one once more."""
    finetune_lr: float = 0.0015
    """Peak learning rate of these steps, for all."""
    recovery: Literal["none", "re-estimation", "refit", "both"] = "both"
    """Recovery without labels right after compression."""
    distillation_weights: tuple[float, ...] = (0.5,)
    """Weights of the imitation, one run with distillation for each."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of the training: no (float32), or bf16 on a CPU with AMX; a seed of a task has one. Evaluation is in
    float32."""
    latency_rounds: int = 60
    """Measured calls of each exported detector; 0 leaves latency out."""
    out: Path = RESULTS / "table3_accuracy.json"
    """Results file; the tables are written beside it as Markdown."""
    work: Path = Path("runs/table3_accuracy")
    """Folder for data, runs and graphs."""


@dataclass(frozen=True)
class Cell:
    """What a trained detector is.

    Attributes:
        model: DENSE, TRAINED or the name of a plan.
        finetune_steps: 0 before any fine-tuning.
        finetune_lr: None before any fine-tuning.
        distillation_weight: None without distillation.
    """

    task: Task
    seed: int
    model: str
    finetune_steps: int = 0
    finetune_lr: float | None = None
    distillation_weight: float | None = None


class Experiment:
    """Runs what is missing and keeps the results file."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.steps = settings, Steps(settings.work)
        key = {name: getattr(settings, name) for name in SHARED}
        self.results: dict[str, Any] = {"settings": key, "cells": {}, "latency": {}}
        if settings.out.is_file():
            self.results = json.loads(settings.out.read_text())
            if self.results["settings"] != key:
                raise UserError(f"{settings.out}: holds other settings; move it away or choose another --out")

    def run(self) -> None:
        """All cells of the settings, then the latency of the first seed's detectors."""
        s = self.settings
        data, crops = s.work / "data", s.work / "crops"
        sizes = ("--train", str(s.train_images), "--val", str(s.val_images), "--min-size", "160", "--max-size", "224")
        self.steps.run("make_synthetic", ["--out", str(data), *sizes], data / "annotations" / "instances_val2017.json")
        self.steps.run("make_crops", ["--data", str(data), "--out", str(crops)], crops / "val")
        for seed in s.seeds:
            body = s.work / f"seed{seed}" / "pretrain"
            config = str(CONFIGS / "train" / "demo_cls.yaml")
            length = ("--steps", str(s.pretrain_steps), "--seed", str(seed))
            self.train("train_cls", ["--config", config, "--data", str(crops), *length], body)
            for task in s.tasks:
                self.run_task(task, seed, body)
        for task in s.tasks if s.latency_rounds else ():
            self.measure_latency(task, s.seeds[0])

    def run_task(self, task: Task, seed: int, body: Path) -> None:
        """The dense detector of a task, then all its compressed forms."""
        s, folder = self.settings, self.settings.work / f"seed{seed}"
        cells = self.results["cells"].items()
        if other := [name for name, cell in cells if (cell["task"], cell["seed"]) == (task, seed)
                     and cell["precision"] != s.precision]:  # fmt: skip
            raise UserError(
                f"{s.out}: its cell '{other[0]}' was trained with another precision than {s.precision}; "
                "give that one with --precision, or choose another seed"
            )
        trained = folder / f"{task}-trained"
        self.detector(Cell(task, seed, TRAINED), trained, body, s.detector_steps, seed)
        recipe, again = (s.finetune_steps, s.finetune_lr), seed + FINETUNE_SEED
        dense = self.finetuned(task, seed, DENSE)
        self.detector(Cell(task, seed, DENSE, *recipe), dense, trained, s.finetune_steps, again)
        for plan in s.plans:
            small, out = folder / f"{task}-{plan}-start", self.finetuned(task, seed, plan)
            self.compress(trained / "last.safetensors", plan, small / "last.safetensors")
            self.detector(Cell(task, seed, plan, *recipe), out, small, s.finetune_steps, again)
            for weight in s.distillation_weights:
                teacher = ["--teacher", str(dense / "last.safetensors"), "--distillation-weight", str(weight)]
                taught = out.with_name(f"{out.name}-distilled-{weight:g}")
                cell = Cell(task, seed, plan, *recipe, weight)
                self.detector(cell, taught, small, s.finetune_steps, again, teacher)

    def finetuned(self, task: Task, seed: int, model: str) -> Path:
        """Folder of a detector's fine-tuning without distillation."""
        s = self.settings
        return s.work / f"seed{seed}" / f"{task}-{model}-{s.finetune_steps}-lr-{s.finetune_lr:g}"

    def detector(
        self, cell: Cell, out: Path, init: Path, steps: int, seed_of_run: int, more: Sequence[str] = ()
    ) -> None:
        """Train one detector and record its accuracy."""
        config = str(CONFIGS / "train" / f"demo_{cell.task}.yaml")
        argv = ["--config", config, "--data", str(self.settings.work / "data"), "--steps", str(steps)]
        argv += ["--seed", str(seed_of_run), "--init", str(init / "last.safetensors"), *more]
        argv += [] if cell.finetune_lr is None else ["--lr", str(cell.finetune_lr)]
        command = self.train("train_det", argv, out)
        name = out.relative_to(self.settings.work).as_posix()
        if name in self.results["cells"]:
            return
        loaded = load_checkpoint(out / "last.safetensors")
        found = loaded.header.settings
        counts = count_complexity(loaded.model, found.input_size, proposals=found.proposals)
        figures = json.loads((out / "metrics.json").read_text())
        self.results["cells"][name] = {
            **asdict(cell),
            "steps": steps,
            "precision": self.settings.precision,
            "command": command,
            "images": self.settings.val_images,
            "metrics": figures["metrics"],
            "macs": counts.macs,
            "params": counts.params,
            "provenance": provenance(),
        }
        self.write()

    def compress(self, trained: Path, plan: str, out: Path) -> None:
        """Compress a trained detector by a plan in its widths, with the recovery of the settings."""
        dense = load_checkpoint(trained)
        full = DetectorSettings(num_classes=dense.header.settings.num_classes).build(dense.header.task)
        loaded = CompressionPlan.load(CONFIGS / "plans" / f"{plan}.yaml")
        narrow_plan(loaded, dense.model, full).save(out.parent / "plan.yaml")  # anew: the step compares its contents
        argv = ["--model", str(trained), "--plan", str(out.parent / "plan.yaml"), "--out", str(out)]
        images = str(self.settings.work / "data" / "train2017")
        argv += ["--refit", images] if self.settings.recovery in ("refit", "both") else []
        argv += ["--reestimate", images] if self.settings.recovery in ("re-estimation", "both") else []
        self.steps.run("compress", argv, out)

    def train(self, name: str, argv: Sequence[str], out: Path) -> str:
        """A training run in its folder, from its last state if there is one; returns its command."""
        command = self.steps.train(name, [*argv, "--precision", self.settings.precision], out)
        for file in ("state.pt", "best.safetensors"):  # some 400 MB a run that nobody needs once it has ended
            (out / file).unlink(missing_ok=True)
        return command

    def measure_latency(self, task: Task, seed: int) -> None:
        """Export the task's detectors and time them in turn in ONNX Runtime."""
        s = self.settings
        measured = self.results["latency"].get(task, {}).get("models", {})
        if {DENSE, *s.plans} <= measured.keys():
            return
        plans = [plan for plan in dict.fromkeys((*measured, *s.plans)) if plan != DENSE]
        images = find_images(s.work / "data" / "val2017")
        models: dict[str, Predictor] = {}
        for model in (DENSE, *plans):
            source = self.finetuned(task, seed, model) / "last.safetensors"
            graph = source.with_name("graph.onnx")
            size = ("--image-size", *map(str, GRAPH_SIZE))
            self.steps.run("export_onnx", ["--model", str(source), *size, "--out", str(graph)], graph)
            models[model] = load_predictor(graph)
        run = measure_alternating(models, images, rounds=s.latency_rounds)
        entries: dict[str, Any] = {name: {"latency": summary_to_dict(run.summary(name))} for name in models}
        for plan in plans:
            entries[plan]["speedup"] = summary_to_dict(run.speedup(DENSE, plan))
        self.results["latency"][task] = {
            "models": entries, "seed": seed, "image_size": GRAPH_SIZE, "provenance": provenance(),
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        """Results and tables, whole or not at all."""
        commands.write_json(self.results, self.settings.out)
        with atomic_write(self.settings.out.with_suffix(".md"), "w") as stream:
            stream.write(accuracy_report(self.results).to_markdown(self.settings.out.parent))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    settings = parse_settings(Settings, argv, prog="table3_accuracy", description=__doc__ or "")
    if not CONFIGS.is_dir():
        raise UserError("configs/: not found; run the benchmark from the repository's root folder")
    Experiment(settings).run()
    print(f"written: {settings.out}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
