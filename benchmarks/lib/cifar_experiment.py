"""VGG-16-BN on CIFAR-10 on one device: its images, the dense model and what is made of it."""

import copy
import math
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.lib.cells import Cell
from benchmarks.lib.resident_training import (
    Loss,
    ResidentSettings,
    logits_of,
    top1_of,
    train_resident,
    use_gpu_forms,
)
from norton_deploy.compression.compress import apply_structure, compress
from norton_deploy.cost.complexity import count_complexity
from norton_deploy.data.resident_images import read_resident_images
from norton_deploy.errors import UserError
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.models.classifiers import ClassifierSettings
from norton_deploy.training.distillation import distillation_loss

IMAGE_SIZE = (32, 32)
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SMOOTHING = 0.1
PART_BYTES = 16.5e6


@dataclass(frozen=True, kw_only=True)
class ExperimentSettings:
    """Where the experiment runs, on what, and how long at most."""

    data: Path
    """Folder with train/CLASS/* and test/CLASS/*, or CIFAR-10's original binary version."""
    state: Path = Path("runs/cifar_gpu")
    """Folder for the weights that later cells start from."""
    epochs: int = 150
    """Most epochs of the dense model and of each stage of a level; the short cells have a tenth of it."""
    device: str = "cuda"
    """cuda or cpu."""
    workers: int = 16
    """Processes that decode the images."""
    seed: int = 0
    """Seed of weights, order, augmentation and decomposition."""
    smoke: bool = False
    """One epoch of everything, for a few images: whether it runs at all."""


def z_scores(logits: Tensor) -> Tensor:
    """Each row of logits [N, K] with mean 0 and standard deviation 1 (Sun et al., eq. 12), float32.

    The student then need not have the teacher's range of logits, only their relations.
    """
    centred = logits.float() - logits.float().mean(dim=1, keepdim=True)
    return centred / (centred.std(dim=1, keepdim=True) + 1e-7)


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning's loss, (1 - weight) cross-entropy + weight KL to the dense model's scores at a temperature;
    standardised: of z-scored logits (Sun et al., CVPR 2024); and whether factors have weight decay."""

    weight: float = 0.8
    temperature: float = 1.0
    standardised: bool = False
    factor_decay: bool = False

    def loss(self, logits: Tensor, labels: Tensor, teacher: Tensor | None) -> Tensor:
        """Mean over the batch."""
        hard = functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        if teacher is None or self.weight == 0:
            return hard
        if self.standardised:
            logits, teacher = z_scores(logits), z_scores(teacher)
        return (1 - self.weight) * hard + self.weight * distillation_loss(logits, teacher, self.temperature)


class Experiment:
    """What the cells share: images, the dense model, its decompositions and its scores."""

    def __init__(self, settings: ExperimentSettings) -> None:
        self.settings, self.device = settings, torch.device(settings.device)
        read = partial(read_resident_images, settings.data, image_size=IMAGE_SIZE, mean=MEAN, std=STD)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # float32 means float32 where it is used
        self.train = read("train", workers=settings.workers).to(self.device)
        self.test = read("val", classes=self.train.classes, workers=settings.workers).to(self.device)
        self.classifier = ClassifierSettings("vgg16_bn", num_classes=len(self.train.classes), image_size=IMAGE_SIZE)
        torch.manual_seed(settings.seed)
        self.skeleton = self.classifier.build()
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
        return round(top1_of(model, self.test, exact=True), 4)

    def scores(self, seed: int, epoch: int, pixels: Tensor) -> Tensor:
        """The dense model's logits for an epoch's images, computed once for all cells."""
        if (seed, epoch) not in self._scores:
            self._scores[seed, epoch] = logits_of(self.models["dense"], pixels, self.train)
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
            factor_decay=recipe is None or recipe.factor_decay,
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


def load_state(experiment: Experiment, name: str, plan: CompressionPlan | None) -> bool:
    """Take a saved model of that plan (None: the dense one) over into the experiment, if there is one."""
    files = sorted(experiment.settings.state.glob(f"{name}-*.safetensors"))
    state = {
        key: value.float() if value.ndim > 1 else value for file in files for key, value in load_file(file).items()
    }
    model = copy.deepcopy(experiment.skeleton)
    if plan is not None:
        apply_structure(model, plan)
    use_gpu_forms(model)
    if state.keys() != model.state_dict().keys():
        return False
    model.load_state_dict(state)
    experiment.models[name] = model.to(experiment.device)
    return True
