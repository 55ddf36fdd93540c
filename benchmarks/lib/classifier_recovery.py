"""What a compressed classifier is worth: at once, with new BatchNorm statistics, and after a short fine-tuning."""

import copy
import hashlib
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from benchmarks.lib.training_runs import PRECISION_NAMES, train_once
from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint, tensors_digest
from norton_deploy.compression.calibration import reestimate_batch_norm
from norton_deploy.cost.complexity import complexity_of
from norton_deploy.data.image_folder import read_images
from norton_deploy.data.resident_images import read_resident_images
from norton_deploy.errors import UserError
from norton_deploy.evaluation.evaluate import evaluate_classifier
from norton_deploy.files import sha256_of
from norton_deploy.method.plan import CompressionPlan
from norton_deploy.training.classifier_training import ClassifierTrainingSettings
from norton_deploy.training.initial_weights import InitialModel
from norton_deploy.training.trainer import NonFiniteLossError

CONTROL = "dense, fine-tuned alike"


@dataclass(frozen=True, kw_only=True)
class RecoverySettings:
    """What the benchmarks of compressed classifiers have in common."""

    model: Path
    """Checkpoint of the trained dense classifier."""
    data: Path
    """Folder with train/CLASS/* and test/CLASS/* (or val/)."""
    runs: Path
    """Folder for the fine-tuning runs; an interrupted one is continued."""
    steps: int = 400
    """Optimizer steps of each fine-tuning, the same for all."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 0.02
    """Learning rate after warm-up; it falls along half a cosine."""
    warmup_steps: int = 50
    """Steps of linear warm-up."""
    weight_decay: float = 5e-4
    """Weight decay of kernels and matrices."""
    clip_norm: float = 5.0
    """Largest norm of the gradient."""
    precision: Literal["no", "bf16"] = "no"
    """Precision of the fine-tuning: no (float32), or bf16 on a CPU with AMX. Evaluation is in float32."""
    reestimate_images: int = 1024
    """Training images, without labels, for the new BatchNorm statistics."""
    workers: int = 2
    """Processes that read images."""
    seed: int = 0
    """Seed of decomposition, data order and augmentation."""


@dataclass(frozen=True)
class Teacher:
    """Attributes: the teacher's checkpoint, the weight of its scores, the temperature."""

    model: Path
    weight: float
    temperature: float


class Recovery:
    """Measures compressed copies of one dense classifier.

    Attributes:
        dense: the classifier, in evaluation mode.
        settings: of the dense classifier.

    Raises:
        UserError: the checkpoint is not that of a dense classifier.
    """

    def __init__(self, recovery: RecoverySettings) -> None:
        checkpoint = load_checkpoint(recovery.model)
        if checkpoint.header.task != "cls" or checkpoint.header.plan is not None:
            raise UserError(f"{recovery.model}: expected a dense classifier")
        self.recovery, self.dense, self.header = recovery, checkpoint.model, checkpoint.header
        self.settings = checkpoint.header.classifier
        self.val = read_resident_images(
            recovery.data,
            "val",
            image_size=self.settings.image_size,
            mean=self.settings.image_mean,
            std=self.settings.image_std,
            classes=checkpoint.header.categories.names,
        )
        self.before = complexity_of(self.dense, self.settings)

    def identity(self) -> dict[str, Any]:
        """What all figures depend on, for the results file: no paths, the model by its digest."""
        recovery = self.recovery
        names = ("steps", "batch_size", "lr", "warmup_steps", "weight_decay", "clip_norm", "precision")
        return {
            "model": f"{recovery.model.parent.name}/{recovery.model.name}",
            "model_sha256": sha256_of(recovery.model),
            "architecture": self.settings.architecture,
            "image_size": self.settings.image_size,
            "test_images": len(self.val),
            "dense_macs": self.before.macs,
            "dense_params": self.before.params,
            **{name: getattr(recovery, name) for name in (*names, "reestimate_images", "seed")},
        }

    def top1(self, model: nn.Module) -> float:
        """Top-1 accuracy on the held-out images, 0..1."""
        scores = evaluate_classifier(
            model.eval(), self.val, torch.device("cpu"), batch_size=256, workers=self.recovery.workers, progress=False
        )
        return scores["top1"]

    def complexity(self, model: nn.Module) -> dict[str, float]:
        """MACs and parameters, and how much less that is than dense, in per cent."""
        after = complexity_of(model, self.settings)
        return {
            "macs": after.macs,
            "params": after.params,
            "macs_reduction_percent": round(100 * (1 - after.macs / self.before.macs), 2),
            "params_reduction_percent": round(100 * (1 - after.params / self.before.params), 2),
        }

    def measure(
        self,
        model: nn.Module,
        plan: CompressionPlan | None,
        name: str,
        *,
        seed: int | None = None,
        teacher: Teacher | None = None,
        other_lr: float | None = None,
    ) -> dict[str, float | None]:
        """MACs, parameters and top-1 (0..1) as compressed, after re-estimation and after fine-tuning.

        Args:
            model: compressed; its BatchNorm statistics are replaced, in place.
            plan: its plan, None for a model that no plan describes (its runs hold no checkpoints then).
            name: of the cell; the run's folder is named after it.
            seed: of the fine-tuning, if not the settings'.
            teacher: distil from it.
            other_lr: fine-tune a second time with this learning rate ("top1_fine_tuned_other_lr").
        """
        figures: dict[str, float | None] = {**self.complexity(model)}
        figures["top1_compressed"] = self.top1(model)
        images = read_images(self.recovery.data / "train", self.recovery.reestimate_images)
        reestimate_batch_norm(model, images, self.settings)
        figures["top1_reestimated"] = self.top1(model)
        if other_lr is not None:
            again = copy.deepcopy(model)
            figures["top1_fine_tuned_other_lr"] = self.fine_tune(
                again, plan, name, seed=seed, teacher=teacher, lr=other_lr
            )
        figures["top1_fine_tuned"] = self.fine_tune(model, plan, name, seed=seed, teacher=teacher)
        return figures

    def fine_tune(
        self,
        model: nn.Module,
        plan: CompressionPlan | None,
        name: str,
        *,
        seed: int | None = None,
        teacher: Teacher | None = None,
        lr: float | None = None,
    ) -> float | None:
        """Top-1 (0..1) after the fine-tuning of the settings, None if it diverged; see `measure`.

        `lr` replaces the settings' learning rate.
        """
        try:
            changes = {} if lr is None else {"lr": lr}
            return self.run(model, plan, name, seed=seed, teacher=teacher, **changes)[1]
        except NonFiniteLossError:
            return None

    def run(
        self,
        model: nn.Module,
        plan: CompressionPlan | None,
        name: str,
        *,
        seed: int | None = None,
        teacher: Teacher | None = None,
        **changes: Any,
    ) -> tuple[Path, float]:
        """Folder and top-1 (0..1) of a fine-tuning with some of `ClassifierTrainingSettings` changed; see `measure`.

        A run that was begun from the same weights with the same settings is continued.

        Raises:
            NonFiniteLossError: it diverged.
        """
        recovery = self.recovery
        label = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        taught = teacher and (sha256_of(teacher.model), teacher.weight, teacher.temperature)
        digest = digest_of(tensors_digest(model.state_dict()), seed, self.identity(), taught, changes)
        out = recovery.runs / f"{label}-{digest}"
        init = None if plan is None else out / "initial.safetensors"
        if init is not None and not init.is_file():
            save_checkpoint(init, model, self.header.made_by(f"benchmark cell: {name}", recovery.model, plan=plan))
        training = ClassifierTrainingSettings(
            out=out,
            data=recovery.data,
            arch=self.settings.architecture,
            init=init,
            image_size=self.settings.image_size,
            style="cifar",
            steps=recovery.steps,
            batch_size=recovery.batch_size,
            lr=recovery.lr,
            schedule="cosine",
            warmup_steps=min(recovery.warmup_steps, recovery.steps // 4),
            weight_decay=recovery.weight_decay,
            clip_norm=recovery.clip_norm,
            precision=recovery.precision,
            cpu_forms=True,
            evaluate_every=0,
            state_every=100,
            workers=recovery.workers,
            seed=recovery.seed if seed is None else seed,
        )
        if teacher is not None:
            training = replace(
                training, teacher=teacher.model, distillation_weight=teacher.weight, temperature=teacher.temperature
            )
        start = None if plan is not None else InitialModel(model, self.settings, None, name)
        metrics = train_once(replace(training, **changes), start=start)["metrics"]
        return out, float(metrics["classification"]["top1"])

    def control(self) -> dict[str, Any]:
        """The dense model after the same fine-tuning: size and top-1."""
        model = copy.deepcopy(self.dense)
        return {**self.complexity(model), "top1_fine_tuned": self.fine_tune(model, None, CONTROL)}


def digest_of(*values: Any) -> str:
    """Eight hexadecimal digits of JSON values, for names of files."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def percent(share: float | None) -> str:
    """0.9123 -> 91.23; None is a training that diverged."""
    return "diverged" if share is None else f"{100 * share:.2f}"


def network_nmse(dense: nn.Module, layer_errors: dict[str, float]) -> dict[str, float]:
    """Normalised squared errors of a whole network from those of its layers.

    Args:
        dense: the dense model.
        layer_errors: layer name -> ||W - rebuilt W||^2 / ||W||^2.

    Returns:
        nmse_mean: the plain mean over the layers; nmse_total: all squared errors over all squared weights.
    """
    weights = {name: cast(Tensor, dense.get_submodule(name).weight) for name in layer_errors}
    energy = {name: float(weight.detach().double().square().sum()) for name, weight in weights.items()}
    total = sum(energy[name] * error for name, error in layer_errors.items()) / sum(energy.values())
    return {"nmse_mean": sum(layer_errors.values()) / len(layer_errors), "nmse_total": total}


def fine_tuning(settings: dict[str, Any]) -> str:
    """Its precision, for captions."""
    return f"precision of the fine-tuning: {PRECISION_NAMES[settings['precision']]}"
