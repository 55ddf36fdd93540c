"""Table III's accuracy on the embedded data: dense and compressed detectors with equal training.

One ResNet-50 per seed is pretrained on object crops. Per task and seed, a dense detector starts from it and is
trained for --detector-steps. Every plan then compresses that trained detector, which is evaluated as it is and
fine-tuned for --finetune-steps, with and without distillation. The control is the dense detector trained on for
--finetune-steps with the same recipe and learning rate: it has seen as many images as each compressed one. The teacher
is whichever of the two dense detectors has the higher AP.

Runs are in folders under --work; whatever is done already is not done again, so the benchmark may be stopped at any
time, and --tasks, --plans, --choose, --seeds, --finetune-steps, --finetune-lr, --distillation-weights and --distill
may be worked through in any order into one results file.

--full-width 800 makes detectors as torchvision publishes them, for one GPU of 40 GiB or more. Where a command may take
only nine minutes run the line twice. It was written for torch 2.11 and torchvision 0.26 without network; beside what an
image with PyTorch holds it needs tyro, docstring-parser, typeguard, pydantic, annotated-types and typing-inspection
(pure Python), and pydantic-core and pycocotools (wheels for that interpreter), but neither av nor, with
--latency-rounds 0, ONNX Runtime:

    timeout -s INT 530 python benchmarks/table3_accuracy.py --full-width 800 --batch-size 16 --workers 12 \
        --precision bf16 --plans table3 --seeds 0 --recovery none --latency-rounds 0 --train-images 2400 \
        --val-images 200 --detector-steps 250 --finetune-steps 100 --work runs/table3_full --out runs/table3_full.json
"""

import sys
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch

from benchmarks.lib.cells import PLANS, RESULTS, ResultCells, run, settings_of
from benchmarks.lib.narrow_plan import compress_narrow
from benchmarks.lib.table3_accuracy_report import DENSE, LATENCY, TRAINED, accuracy_report
from benchmarks.lib.training_runs import LAST, read_recipe, train_once
from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.data.classification import write_crops
from norton_deploy.data.image_folder import find_images
from norton_deploy.data.synthetic import write_dataset
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import table3_scores
from norton_deploy.evaluation.evaluate import evaluate_file
from norton_deploy.inference.loading import load_predictor
from norton_deploy.method.plan import Choice, CompressionPlan
from norton_deploy.models.detector_parts import ImageSettings
from norton_deploy.models.detectors import DetectorSettings
from norton_deploy.parity.export_checked import ExportOptions, export_checked, open_detector
from norton_deploy.reporting.latency import measure_alternating
from norton_deploy.structures import TASKS, Task
from norton_deploy.training.classifier_training import ClassifierTrainingSettings
from norton_deploy.training.detector_training import DetectorTrainingSettings, Distill

FINETUNE_SEED = 1000
"""Added to the seed after the first phase, so that the second sees the images in another order."""
SHARED = ("train_images", "val_images", "pretrain_steps", "recovery")
"""Settings that all cells of a results file have in common."""
SCALE = ("full_width", "batch_size", "sampled_rois")
"""The same; a file that does not name them has the defaults. They name the folder of the runs as well."""
NARROW_SIDE = 192
"""Short side of the demo's detectors, px."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/table3_accuracy.py."""

    tasks: tuple[Task, ...] = TASKS
    """Which detectors."""
    plans: tuple[str, ...] = ("table3", "balanced", "fast")
    """Which plans of configs/plans/."""
    choose: Choice | None = None
    """Which filters survive, in place of what the plans say: angles, or harm on the images of the refit."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of the training; the data are the same for all."""
    train_images: int = 4000
    """Training images to draw."""
    val_images: int = 500
    """Held-out images to draw."""
    pretrain_steps: int = 300
    """Steps of 32 object crops that pretrain the ResNet-50, the stand-in for ImageNet."""
    detector_steps: int = 1200
    """Steps of --batch-size images that train the dense detector of a task; keypoints need more than boxes."""
    finetune_steps: int = 600
    """Steps of --batch-size images for every compressed detector, and for the dense one once more."""
    finetune_lr: float = 0.0015
    """Peak learning rate of these steps, for all."""
    recovery: Literal["none", "re-estimation", "refit", "both"] = "both"
    """Recovery without labels right after compression."""
    distillation_weights: tuple[float, ...] = (0.5,)
    """Weights of the pyramid's imitation, one run with distillation for each."""
    distill: tuple[Distill, ...] = ("pyramid",)
    """What is imitated, one run with distillation for each."""
    full_width: int | None = None
    """Short side in pixels (800: as published) of detectors with torchvision's own widths, anchors and proposals, and
    of the scenes; without it narrow ones at 192 px, for two cores."""
    batch_size: int = 4
    """Images in a step of a detector."""
    sampled_rois: int | None = None
    """Proposals per image that the heads learn from, instead of the detector's own (128; at --full-width 512): fewer
    take less time on a CPU. The widths, and what is evaluated, stay the same."""
    workers: int = 1
    """Processes that read images."""
    device: Literal["auto", "cpu"] = "auto"
    """auto: a GPU when there is one."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of the training: no (float32), or bf16 on a GPU or a CPU with AMX; a seed of a task has one. Evaluation
    is in float32."""
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
        model: DENSE, TRAINED or the name of a plan, with "-angles" or "-harm" after it where that was chosen.
        finetune_steps: 0 before any fine-tuning; of a plan: compressed and recovered only.
        finetune_lr: None before any fine-tuning.
        distillation_weight: None without distillation.
        distill: what is imitated; None without distillation.
        teacher: DENSE or TRAINED; None without distillation.
    """

    task: Task
    seed: int
    model: str
    finetune_steps: int = 0
    finetune_lr: float | None = None
    distillation_weight: float | None = None
    distill: Distill | None = None
    teacher: str | None = None


def main(settings: Settings) -> int:
    """All cells of the settings, then the latency of the first seed's detectors."""
    experiment = Experiment(settings)
    data, crops = experiment.root / "data", experiment.root / "crops"
    if not data.is_dir():
        smallest, largest = (round(side * experiment.side / NARROW_SIDE) for side in (160, 224))
        write_dataset(data, settings.train_images, settings.val_images, image_sizes=(smallest, largest))
    if not crops.is_dir():
        write_crops(data, crops)
    for seed in settings.seeds:
        start = experiment.pretrained(crops, seed)
        for task in settings.tasks:
            experiment.run_task(task, seed, start)
    for task in settings.tasks if settings.latency_rounds else ():
        known = experiment.results.cells.get(f"{LATENCY}{task}", {}).get("models", {})
        models = list(dict.fromkeys((DENSE, *known, *map(experiment.compressed, settings.plans))))
        measure = partial(experiment.latency, task, settings.seeds[0], models)
        experiment.results.measure(f"{LATENCY}{task}", measure, again=len(models) > len(known))
    return experiment.results.measure_all({})


class Experiment:
    """Runs what is missing and keeps the results file."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        told = settings_of(settings)
        scale = {name: told[name] for name in SCALE if told[name] != getattr(Settings, name)}
        self.results = ResultCells(settings.out, {**{name: told[name] for name in SHARED}, **scale}, report)
        self.side = settings.full_width or NARROW_SIDE
        self.root = settings.work / "-".join(f"{name}{value}" for name, value in scale.items())

    def computing(self) -> dict[str, Any]:
        """Where and in which form trainings compute."""
        s = self.settings
        on_gpu = s.device == "auto" and torch.cuda.is_available()
        forms = {"cpu_forms": not on_gpu, "recompose_blocks": on_gpu}
        return {"device": s.device, "precision": s.precision, "workers": s.workers, **forms}

    def detector_fields(self) -> dict[str, Any]:
        """Of a recipe: what --full-width and --sampled-rois make of the demo's detectors."""
        sampled = self.settings.sampled_rois
        own_roi = {} if sampled is None else {"batch_per_image": sampled}
        if self.settings.full_width is None:
            return {"detector": {"roi": own_roi}} if own_roi else {}
        own, scale = DetectorSettings(), self.side / ImageSettings().min_size
        sizes = {"min_size": self.side, "max_size": round(self.side * 4 / 3)}
        anchors = [round(size * scale) for size in own.rpn.anchor_sizes]
        roi = {**asdict(own.roi), "canonical_scale": round(own.roi.canonical_scale * scale)} | own_roi
        detector = {"image": sizes, "rpn": {**asdict(own.rpn), "anchor_sizes": anchors}, "roi": roi}
        return {"detector": {**detector, "backbone": {"fpn_channels": own.backbone.fpn_channels}}}

    def pretrained(self, crops: Path, seed: int) -> Path:
        """The seed's ResNet-50, trained on object crops."""
        out = self.root / f"seed{seed}" / "pretrain"
        given = {"data": crops, "steps": self.settings.pretrain_steps, "seed": seed, **self.computing()}
        train_once(read_recipe(ClassifierTrainingSettings, "demo_cls", out=out, **given))
        return out / LAST

    def run_task(self, task: Task, seed: int, start: Path) -> None:
        """The dense detector of a task, whose backbone starts from a file, then all its compressed forms."""
        s = self.settings
        for name, cell in self.results.cells.items():
            is_own = not name.startswith(LATENCY) and (cell["task"], cell["seed"]) == (task, seed)
            if is_own and cell["precision"] != s.precision:
                raise UserError(
                    f"{s.out}: its cell '{name}' was trained with another precision than {s.precision}; "
                    "give that one with --precision, or choose another seed"
                )
        trained = self.root / f"seed{seed}" / f"{task}-trained"
        self.detector(Cell(task, seed, TRAINED), trained, start)
        recipe = (s.finetune_steps, s.finetune_lr)
        dense = self.finetuned(task, seed, DENSE)
        self.detector(Cell(task, seed, DENSE, *recipe), dense, trained / LAST)
        scores = {out: self.results.cells[self.name_of(out)]["metrics"] for out in (trained, dense)}
        teacher = max(scores, key=lambda out: table3_scores(task, scores[out])[0])
        for plan in s.plans:
            name = self.compressed(plan)
            small, out = trained.with_name(f"{task}-{name}-start") / LAST, self.finetuned(task, seed, name)
            self.compress(trained / LAST, plan, small)
            self.recovered(Cell(task, seed, name), small)
            self.detector(Cell(task, seed, name, *recipe), out, small)
            for weight, distill in product(s.distillation_weights, s.distill):
                part = "" if distill == "pyramid" else f"-{distill}"
                taught = out.with_name(f"{out.name}-distilled-{weight:g}{part}")
                cell = Cell(task, seed, name, *recipe, weight, distill, TRAINED if teacher == trained else DENSE)
                self.detector(cell, taught, small, teacher=teacher / LAST)

    def compressed(self, plan: str) -> str:
        """What detectors that are compressed by a plan are called."""
        return plan if self.settings.choose is None else f"{plan}-{self.settings.choose}"

    def name_of(self, out: Path) -> str:
        """A detector's cell in the results file."""
        return out.relative_to(self.root).as_posix()

    def finetuned(self, task: Task, seed: int, model: str) -> Path:
        """Folder of a detector's fine-tuning without distillation."""
        s = self.settings
        return self.root / f"seed{seed}" / f"{task}-{model}-{s.finetune_steps}-lr-{s.finetune_lr:g}"

    def detector(self, cell: Cell, out: Path, init: Path, teacher: Path | None = None) -> None:
        """Train one detector and record its accuracy."""
        s = self.settings
        given: dict[str, Any] = {} if cell.finetune_lr is None else {"lr": cell.finetune_lr}
        if teacher is not None:
            given |= {"teacher": teacher, "distillation_weight": cell.distillation_weight, "distill": cell.distill}
        recipe = read_recipe(
            DetectorTrainingSettings,
            f"demo_{cell.task}",
            out=out,
            data=self.root / "data",
            init=init,
            steps=cell.finetune_steps or s.detector_steps,
            batch_size=s.batch_size,
            seed=cell.seed + (FINETUNE_SEED if cell.finetune_steps else 0),
            **self.computing(),
            **self.detector_fields(),
            **given,
        )
        figures = train_once(recipe)
        self.results.measure(self.name_of(out), lambda: self.described(cell, out / LAST, figures))

    def recovered(self, cell: Cell, file: Path) -> None:
        """Record the accuracy of a compressed detector that is not fine-tuned."""

        def evaluated() -> dict[str, Any]:
            workers = self.settings.workers
            found = evaluate_file(file, self.root / "data", cell.task, workers=workers, progress=False).to_dict()
            return self.described(cell, file, {"steps": 0, "metrics": found["metrics"]})

        self.results.measure(self.name_of(file.parent), evaluated)

    def described(self, cell: Cell, file: Path, figures: dict[str, Any]) -> dict[str, Any]:
        """What the results file says of a detector; `figures` are its steps and metrics."""
        loaded = load_checkpoint(file)
        counts = complexity_of(loaded.model, loaded.header.settings)
        size = {"macs": counts.macs, "params": counts.params}
        told = {"precision": self.settings.precision, "images": self.settings.val_images}
        return {**asdict(cell), **figures, **told, **size}

    def compress(self, trained: Path, plan: str, out: Path) -> None:
        """Compress a trained detector by a plan in its widths, with the recovery of the settings."""
        if out.is_file():
            return
        refit = 64 if self.settings.recovery in ("refit", "both") else 0
        reestimate = 256 if self.settings.recovery in ("re-estimation", "both") else 0
        small = compress_narrow(
            load_checkpoint(trained),
            trained,
            CompressionPlan.load(PLANS / f"{plan}.yaml"),
            self.root / "data" / "train2017",
            refit=refit,
            reestimate=reestimate,
            choose=self.settings.choose,
        )
        save_checkpoint(out, small.model, small.header)

    def latency(self, task: Task, seed: int, models: list[str]) -> dict[str, Any]:
        """Export the task's detectors and time them in turn in ONNX Runtime."""
        s, graphs, size = self.settings, {}, (self.side, self.side)
        for name in models:
            file = self.finetuned(task, seed, name) / "graph.onnx"
            model, _, categories = open_detector(str(file.with_name(LAST)), task)
            options, note = ExportOptions(image_size=size), partial(print, file=sys.stderr)
            graphs[name] = load_predictor(export_checked(model, task, categories, file, options, report=note).file)
        ledger = measure_alternating(graphs, find_images(self.root / "data" / "val2017"), rounds=s.latency_rounds)
        entries: dict[str, Any] = {name: {"latency": ledger.summary(name).to_dict()} for name in models}
        for name in models[1:]:
            entries[name]["speedup"] = ledger.speedup(DENSE, name).to_dict()
        return {"models": entries, "seed": seed, "image_size": size}


def report(results: ResultCells) -> str:
    """The tables; no HTML."""
    return accuracy_report(results).to_markdown(results.path.parent)


if __name__ == "__main__":
    run(Settings, main)
