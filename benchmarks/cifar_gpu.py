"""The paper's Tables I and IV on one GPU in some minutes: VGG-16-BN on CIFAR-10, trained, compressed, fine-tuned.

All images lie on the GPU (norton_deploy/data/resident_images.py) and a step is the replay of a recorded graph, so that
an epoch costs what its convolutions cost. As the authors do, the plans that decompose and prune are fine-tuned twice,
after decomposing and after pruning; the first stage is the plan of 88 %. Every cell gets a share of the seconds that
are left and trains for as many epochs as fit into it, at most --epochs; a cell is written when it is done, an error is
written in its place and tried again by the next run, and cells for which no time is left are left to it too.

    python benchmarks/cifar_gpu.py --data cifar10.tar.xz --state runs/cifar_gpu --budget 330
"""

import copy
import math
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, page, run
from benchmarks.lib.resident_training import (
    Colours,
    Loss,
    ResidentSettings,
    logits_of,
    top1_of,
    train_resident,
)
from norton_deploy.compression.compress import apply_structure, compress, prune
from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.compression.gpu_forms import use_gpu_forms
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.data.resident_images import read_resident_images
from norton_deploy.errors import UserError
from norton_deploy.method.cp import layer_nmse
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings, build_dense_classifier
from norton_deploy.reporting.tables import Table
from norton_deploy.training.logit_distillation import distillation_loss

PLANS = Path("configs/plans")
IMAGE_SIZE = (32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DECOMPOSED = "vgg16_88"  # rank 1, not pruned: the first stage of those that are
# Table I: plan -> top-1 (%); Table IV: rank -> NMSE, top-1 (%) without and with fine-tuning. Dense: 93.96 %.
PAPER_LEVELS = {"vgg16_77": 94.11, "vgg16_88": 93.84, "vgg16_96": 92.54, "vgg16_99": 90.32}
PAPER_RANKS = {
    1: (0.6265, 10.00, 93.84),
    2: (0.4114, 10.00, 94.11),
    3: (0.2760, 68.37, 94.18),
    4: (0.1837, 88.30, 94.07),
    5: (0.1173, 92.44, 94.22),
    6: (0.0698, 93.45, 94.15),
    7: (0.0372, 93.90, 94.11),
    8: (0.0137, 94.03, 94.03),
}
PAPER_DENSE = 93.96
MINIMUM_S = 2.0  # a cell that would get less is left to the next run
PART_BYTES = 16.5e6
NOTES = f"""\
Top-1 on the 10,000 test images after the last epoch, in float32; "best epoch" is the best of all epochs on the same \
test images (in mixed precision), which is how the paper's code chooses and flatters. A drop is in points below the \
dense model of the same column; a negative one is a gain. Paper: its Tables I and IV, dense {PAPER_DENSE} %, \
400 epochs a stage. Epochs are those of the stages one after another. CIFAR-10 here is not the original but coded as \
JPEG of quality 75 with colours at half the resolution, in training and test images alike. That costs accuracy, how \
much was not measured: compare drops, not accuracies. Compressed layers ran as the one \
convolution that they equal. A second seed is one of order and augmentation in the last stage."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of benchmarks/cifar_gpu.py."""

    data: Path
    """Folder or tar archive with train/CLASS/* and test/CLASS/*."""
    state: Path = Path("runs/cifar_gpu")
    """Folder for the weights that later cells start from."""
    out: Path = RESULTS / "cifar_gpu.json"
    """Results file; a Markdown table is written beside it."""
    budget: float = 330.0
    """Seconds in all."""
    epochs: int = 150
    """Most epochs of the dense model and of each stage of a level; the short cells have a tenth of it."""
    device: str = "cuda"
    """cuda or cpu."""
    workers: int = 16
    """Processes that decode the images."""
    seed: int = 0
    """Seed of weights, order, augmentation and decomposition."""
    smoke: bool = False
    """A few images and one epoch of everything: whether it runs at all."""


@dataclass(frozen=True)
class Recipe:
    """Loss of a fine-tuning: (1 - weight) cross-entropy + weight KL to the dense model's scores at a temperature;
    standardised: of z-scored logits (Sun et al., CVPR 2024)."""

    weight: float = 0.8
    temperature: float = 1.0
    standardised: bool = False

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """Mean over the batch."""
        hard = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        if teacher is None or self.weight == 0:
            return hard
        if self.standardised:
            logits, teacher = z_scores(logits), z_scores(teacher)
        return (1 - self.weight) * hard + self.weight * distillation_loss(logits, teacher, self.temperature)


SMOOTHING = 0.1
RECIPE = Recipe()
"""Chosen before any of it was measured: a teacher trained with smoothed labels is said to teach best unsoftened
(Chandrasegaran et al., ICML 2022)."""
ABLATION = {
    "labels alone": Recipe(weight=0),
    "distilled, T = 1": RECIPE,
    "distilled, T = 4": Recipe(temperature=4.0),
    "distilled, standardised, T = 2": Recipe(temperature=2.0, standardised=True),
}


def z_scores(logits: Tensor) -> Tensor:
    """Each row with mean 0 and standard deviation 1."""
    centred = logits - logits.mean(dim=1, keepdim=True)
    return centred / (centred.std(dim=1, keepdim=True) + 1e-7)


class Experiment:
    """What the cells share: images, the dense model, its decompositions and its scores."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        sets = read_resident_images(settings.data, per_class=4 if settings.smoke else None, workers=settings.workers)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32 where it is used
        self.train, self.test = sets["train"].to(self.device), sets["val"].to(self.device)
        self.colours = Colours(MEAN, STD, self.device)
        self.classifier = ClassifierSettings("vgg16_bn", num_classes=len(self.train.classes), image_size=IMAGE_SIZE)
        torch.manual_seed(settings.seed)
        self.skeleton = build_dense_classifier(self.classifier)
        self.layers = [name for name, layer in self.skeleton.named_modules() if isinstance(layer, nn.Conv2d)]
        self.before = count_complexity(self.skeleton, IMAGE_SIZE)
        self.models: dict[str, nn.Module] = {}
        self._scores: dict[tuple[int, int], Tensor] = {}
        self._threads = ThreadPoolExecutor(2)
        self._decomposed: dict[int, Future[nn.Module]] = {}

    def plan(self, rank: int) -> CompressionPlan:
        """Every convolution at this rank, nothing pruned."""
        return CompressionPlan("vgg16_bn", dict.fromkeys(self.layers, rank))

    def size(self, plan: CompressionPlan) -> Cell:
        """MACs and parameters of a plan, and how much less that is than dense, in per cent."""
        after = count_complexity(apply_structure(copy.deepcopy(self.skeleton), plan), IMAGE_SIZE)
        return {
            "macs": after.macs,
            "params": after.params,
            "macs_reduction_percent": round(100 * (1 - after.macs / self.before.macs), 2),
            "params_reduction_percent": round(100 * (1 - after.params / self.before.params), 2),
        }

    def decompose(self, ranks: Iterable[int]) -> None:
        """Begin to decompose the dense model, on the CPU, while the GPU does other things."""
        dense = copy.deepcopy(self.models["dense"]).cpu().eval()
        for rank in ranks:
            job = partial(compress, dense, self.plan(rank), seed=self.settings.seed)
            self._decomposed[rank] = self._threads.submit(job)

    def decomposed(self, rank: int) -> nn.Module:
        """A copy of the dense model at this rank, on the CPU."""
        if rank not in self._decomposed:
            self.decompose([rank])
        return copy.deepcopy(self._decomposed[rank].result())

    def close(self) -> None:
        """Give up decompositions that nobody waits for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def top1(self, model: nn.Module) -> float:
        """On the test images, in float32."""
        return round(top1_of(model, self.test, self.colours, exact=True), 4)

    def scores(self, seed: int, epoch: int, pixels: Tensor) -> Tensor:
        """The dense model's logits for an epoch's images, computed once for all cells."""
        if (seed, epoch) not in self._scores:
            self._scores[seed, epoch] = logits_of(self.models["dense"], pixels, self.colours)
        return self._scores[seed, epoch]

    def fine_tune(
        self,
        model: nn.Module,
        seconds: float,
        epochs: int | None,
        *,
        recipe: Recipe | None,
        short: bool = False,
        seed: int | None = None,
    ) -> tuple[nn.Module, Cell]:
        """Train a copy on the device; once more with a quarter of the learning rate if that diverges.

        Args:
            model: on any device, in any form.
            seconds: time to fill, unless
            epochs: are given.
            recipe: None for the dense model itself, on labels alone.
            short: a tenth of the epochs.
            seed: if not the settings'.
        """
        seed = self.settings.seed if seed is None else seed
        most = 1 if self.settings.smoke else self.settings.epochs // (10 if short else 1)
        seconds = seconds if epochs is None else math.inf
        training = ResidentSettings(
            batch_size=20 if self.settings.smoke else 512,
            lr=0.2 if recipe is None else 0.1,
            epochs=epochs or most,
            warmup_epochs=2 if short else 5,
        )
        loss: Loss = (recipe or Recipe(weight=0)).loss
        teacher = partial(self.scores, seed) if recipe is not None and recipe.weight else None
        for attempt in (training, replace(training, lr=training.lr / 4)):
            trained = use_gpu_forms(copy.deepcopy(model).to(self.device))
            try:
                figures = train_resident(
                    trained,
                    self.train,
                    self.test,
                    self.colours,
                    loss,
                    attempt,
                    seed=seed,
                    seconds=seconds,
                    teacher=teacher,
                )
            except FloatingPointError as error:
                print(error, file=sys.stderr, flush=True)
                continue
            curve = figures.pop("top1_each_epoch")
            best = {"top1_best_epoch": max(curve), "top1_every_tenth_epoch": curve[9::10]}
            return trained, figures | {"top1": self.top1(trained)} | best
        raise UserError("diverged at both learning rates")


def measure_dense(experiment: Experiment, seconds: float, epochs: int | None) -> Cell:
    """Train the dense model."""
    model, figures = experiment.fine_tune(experiment.skeleton, seconds, epochs, recipe=None)
    experiment.models["dense"] = model
    save_state(model, experiment.settings.state, "dense")
    return {"macs": experiment.before.macs, "params": experiment.before.params, **figures}


def measure_level(
    experiment: Experiment, name: str, recipe: Recipe, seconds: float, epochs: int | None, **how: Any
) -> Cell:
    """A plan of Table I: decomposed, or pruned from what DECOMPOSED has become; then fine-tuned."""
    plan = CompressionPlan.load(PLANS / f"{name}.yaml")
    if plan.keep:
        start = prune(copy.deepcopy(experiment.models[DECOMPOSED]).cpu(), plan.keep)
    else:
        start = experiment.decomposed(next(iter(plan.ranks.values())))
    compressed = experiment.top1(use_gpu_forms(copy.deepcopy(start).to(experiment.device)))
    model, figures = experiment.fine_tune(start, seconds, epochs, recipe=recipe, **how)
    if name == DECOMPOSED and not how:
        experiment.models[name] = model
        save_state(model, experiment.settings.state, name)
    return {"plan": plan.to_dict(), **experiment.size(plan), "top1_compressed": compressed, **figures}


def measure_rank(experiment: Experiment, rank: int, seconds: float, epochs: int | None) -> Cell:
    """A row of Table IV: errors, top-1 as decomposed and after a short fine-tuning on labels and scores."""
    small = experiment.decomposed(rank)
    errors, energies = [], []
    for name in experiment.layers:
        block, conv = small.get_submodule(name), experiment.models["dense"].get_submodule(name)
        assert isinstance(block, CPDBlock) and isinstance(conv, nn.Conv2d)
        weight = conv.weight.detach().cpu()
        errors.append(layer_nmse(weight, block.factors()))
        energies.append(float(weight.double().square().sum()))
    total = sum(error * energy for error, energy in zip(errors, energies, strict=True)) / sum(energies)
    compressed = experiment.top1(use_gpu_forms(copy.deepcopy(small).to(experiment.device)))
    _, figures = experiment.fine_tune(small, seconds, epochs, recipe=RECIPE, short=True)
    nmse = {"nmse_mean": sum(errors) / len(errors), "nmse_total": total}
    return {**experiment.size(experiment.plan(rank)), **nmse, "top1_compressed": compressed, **figures}


def save_state(model: nn.Module, folder: Path, name: str) -> None:
    """Write a model's weights, kernels in float16, in files of at most 16 MiB."""
    parts: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, value in model.state_dict().items():
        stored = (value.half() if value.ndim > 1 else value).detach().cpu().contiguous()
        if size + stored.nbytes > PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][key] = stored
        size += stored.nbytes
    folder.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(parts):
        save_file(part, folder / f"{name}-{index}.safetensors", {"parts": str(len(parts))})


def load_state(experiment: Experiment, name: str) -> bool:
    """Take a saved model over into the experiment, if there is one."""
    files = sorted(experiment.settings.state.glob(f"{name}-*.safetensors"))
    state = {
        key: value.float() if value.ndim > 1 else value for file in files for key, value in load_file(file).items()
    }
    model = copy.deepcopy(experiment.skeleton)
    if name != "dense":
        apply_structure(model, CompressionPlan.load(PLANS / f"{name}.yaml"))
    use_gpu_forms(model)
    if state.keys() != model.state_dict().keys():
        return False
    model.load_state_dict(state)
    experiment.models[name] = model.to(experiment.device)
    return True


@dataclass(frozen=True)
class PlannedCell:
    """Attributes: weight in sharing the time; what measures it, (seconds, epochs or None) -> cell; a cell that it is
    compared with, whose epochs it takes over and whose time it must have."""

    weight: float
    measure: Callable[[float, int | None], Cell]
    like: str | None = None


def planned_cells(experiment: Experiment) -> dict[str, PlannedCell]:
    """All cells, the most telling first."""
    smoke = experiment.settings.smoke
    level, rank_row = partial(measure_level, experiment), partial(measure_rank, experiment)
    cells = {"dense": PlannedCell(32, partial(measure_dense, experiment))}
    for name, weight in ((DECOMPOSED, 16), ("vgg16_99", 9), ("vgg16_96", 9), ("vgg16_77", 15))[: 2 if smoke else None]:
        cells[name] = PlannedCell(weight, partial(level, name, RECIPE))
    first = None
    for how, recipe in list(ABLATION.items())[3 if smoke else 0 :]:
        name = f"vgg16_99, {how}"
        cells[name] = PlannedCell(1.5, partial(level, "vgg16_99", recipe, short=True), first)
        first = first or name
    for rank in (1,) if smoke else PAPER_RANKS:
        cells[f"rank {rank}"] = PlannedCell(2, partial(rank_row, rank), None if rank == 1 else "rank 1")
    for name in ("vgg16_99",) if smoke else ("vgg16_99", "vgg16_96", "vgg16_88", "vgg16_77"):
        again = partial(level, name, RECIPE, seed=experiment.settings.seed + 1)
        cells[f"{name}, second seed"] = PlannedCell(0, again, name)
    return cells


def main(settings: Settings) -> None:
    """Run the benchmark."""
    started = time.perf_counter()
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # the rest is for who launches the GPU's work
    experiment = Experiment(settings)
    print(f"images read after {time.perf_counter() - started:.1f} s", file=sys.stderr, flush=True)
    identity = {
        "train_images": len(experiment.train),
        "test_images": len(experiment.test),
        "seed": settings.seed,
        "smoothing": SMOOTHING,
        "recipe": vars(RECIPE),
        "most_epochs": settings.epochs,
    }
    results = ResultCells(settings.out, identity, report)
    for name in [name for name, cell in results.cells.items() if "error" in cell]:
        del results.cells[name]
    for name in ("dense", DECOMPOSED):
        if name in results.cells and not load_state(experiment, name):
            results.cells.clear() if name == "dense" else results.cells.pop(name)
    if "dense" in results.cells:
        experiment.decompose(PAPER_RANKS)
    cells = planned_cells(experiment)
    for name, cell in cells.items():
        if name in results.cells:
            continue
        left = settings.budget - (time.perf_counter() - started)
        epochs = None
        if cell.like is None:
            weights = [other.weight for key, other in cells.items() if key not in results.cells]
            seconds = left * cell.weight / sum(weights)
        else:
            model = results.cells.get(cell.like, {})
            seconds, epochs = left, model.get("epochs")
            if epochs is None or model["seconds"] > left:
                continue
        if seconds < MINIMUM_S and not settings.smoke:
            continue
        measured = results.measure(name, partial(guarded, cell.measure, seconds, epochs))
        print({key: value for key, value in measured.items() if key not in ("plan", "provenance")}, file=sys.stderr)
        if name == "dense":
            if "error" in measured:
                raise UserError(f"the dense model: {measured['error']}")
            experiment.decompose((1,) if settings.smoke else PAPER_RANKS)
    experiment.close()


def report(results: ResultCells) -> str:
    """All tables of the cells so far; an error of the dense model leaves nothing to compare with."""
    dense = results.cells.get("dense", {})
    return page(*(tables(results.cells) if "epochs" in dense else []), NOTES)


def guarded(measure: Callable[[float, int | None], Cell], seconds: float, epochs: int | None) -> Cell:
    """A cell, or the error in its place: the others go on."""
    try:
        return measure(seconds, epochs)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def tables(cells: dict[str, Cell]) -> list[Table]:
    """Table I with the ablation and the second seed, and Table IV, of the cells so far."""
    dense = cells["dense"]
    done = {name: cell for name, cell in cells.items() if "error" not in cell}
    levels: list[tuple[str, ...]] = []
    for name, cell in done.items():
        if name.startswith("rank"):
            continue
        plan = name.partition(",")[0]
        stages = [dense["epochs"]] if name == "dense" else [cell["epochs"]]
        if cell.get("plan", {}).get("keep"):
            stages.insert(0, cells[DECOMPOSED]["epochs"])
        paper = f"{PAPER_DENSE - PAPER_LEVELS[plan]:.2f}" if plan in PAPER_LEVELS else "-"
        best = f"{100 * cell['top1_best_epoch']:.2f} ({points(dense['top1_best_epoch'] - cell['top1_best_epoch'])})"
        started = f"{100 * cell['top1_compressed']:.2f}" if "top1_compressed" in cell else "-"
        accuracy = f"{100 * cell['top1']:.2f}", points(dense["top1"] - cell["top1"])
        levels.append((name, *size(cell), " + ".join(map(str, stages)), started, *accuracy, paper, best))
    header = (
        "Model",
        "MACs (CR %)",
        "Params (CR %)",
        "Epochs",
        "Before fine-tuning %",
        "Top-1 %",
        "Drop",
        "Drop, paper",
    )
    ranks = []
    for name, cell in done.items():
        if name.startswith("rank"):
            nmse, without, tuned = PAPER_RANKS[int(name.split()[1])]
            row = (f"{cell['nmse_mean']:.4f} / {cell['nmse_total']:.4f} ({nmse:.4f})", str(cell["epochs"]))
            accuracy = f"{100 * cell['top1_compressed']:.2f} ({without:.2f})", f"{100 * cell['top1']:.2f} ({tuned:.2f})"
            ranks.append((name, *size(cell), *row, *accuracy))
    rank_header = ("Rank", "MACs (CR %)", "Params (CR %)", "NMSE mean / total", "Epochs", "As decomposed %", "Top-1 %")
    return [
        Table((*header, "Best epoch % (drop)"), tuple(levels), "Table I"),
        Table(rank_header, tuple(ranks), "Table IV, the paper's figures in brackets"),
    ]


def points(drop: float) -> str:
    """0.0123 -> 1.23."""
    return f"{100 * drop:.2f}"


def size(cell: Cell) -> tuple[str, str]:
    """MACs and parameters with their reductions."""
    reductions = cell.get("macs_reduction_percent", 0.0), cell.get("params_reduction_percent", 0.0)
    return f"{cell['macs'] / 1e6:.2f}M ({reductions[0]:.1f})", f"{cell['params'] / 1e6:.2f}M ({reductions[1]:.1f})"


if __name__ == "__main__":
    run(Settings, main)
