"""The training loop, the same for detectors and classifiers, one process or many."""

import json
import math
import resource
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from norton_deploy.errors import UserError, worker_deaths
from norton_deploy.files import atomic_write
from norton_deploy.progress import progress_bar
from norton_deploy.training.batches import Batch, EpochLoader
from norton_deploy.training.forms import recompose_blocks, use_cpu_forms
from norton_deploy.training.run_folder import (
    RunFolder,
    RunState,
    broken_state,
    load_state,
    save_state,
    seed_step,
)
from norton_deploy.training.run_log import RunLog
from norton_deploy.training.settings import TrainingSettings, build_optimizer
from norton_deploy.training.stop_signals import StopSignals

LossTerms = Callable[[nn.Module, Batch], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Evaluation:
    """Metrics, one dictionary for each measure, and the one number that is to rise."""

    metrics: dict[str, dict[str, float]]
    score: float


@dataclass(frozen=True)
class TrainingResult:
    """Attributes: steps done; the last evaluation's metrics; the best score of all evaluations."""

    steps: int
    metrics: dict[str, dict[str, float]]
    best: float | None


class NonFiniteLossError(UserError):
    """The loss or the gradient is not a finite number; non_finite.json holds the batch."""


class Trainer:
    """Trains one model.

    Every process calls `start` (or `run`) and takes part in every step and every evaluation; the main one writes.
    Gradients are averaged over the processes, so a loss that is a mean over images gives the same step as
    one process with all the images. torchvision's RPN and box losses are means over the sampled anchors and
    proposals of the process: equal as long as each image yields its full sample. Mask and keypoint losses
    are means over the positives of the process, which weighs a process's few positives more, as in every
    common implementation.

    Args:
        model: on any device; trained in place.
        loss_terms: (model in training mode, batch) -> scalar losses, whose sum is minimised.
        evaluate: model in evaluation mode -> Evaluation; called on every process.
        save_model: (path, model) writes a checkpoint; called on the main process.
        identity: what decides the weights beside the settings; a resumed run must have the same.
        announce: called on the main process with what the run starts from, where it goes on, or stopped.
    """

    def __init__(
        self,
        *,
        accelerator: Accelerator,
        model: nn.Module,
        loss_terms: LossTerms,
        loader: EpochLoader,
        settings: TrainingSettings,
        evaluate: Callable[[nn.Module], Evaluation],
        save_model: Callable[[Path, nn.Module], None],
        identity: Mapping[str, Any],
        announce: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.accelerator, self.loss_terms, self.loader, self.settings = accelerator, loss_terms, loader, settings
        self.evaluate, self.save_model, self.announce = evaluate, save_model, announce
        self.identity = {**settings.identity(), **identity, "processes": accelerator.num_processes}
        if settings.cpu_forms:
            use_cpu_forms(model)
        if settings.recompose_blocks:
            recompose_blocks(model)
        self.folder = RunFolder(settings.out)
        self.steps_per_epoch = len(loader)
        self.total_steps = settings.total_steps(self.steps_per_epoch)
        self.peak_lr = settings.peak_lr(settings.batch_size * accelerator.num_processes)
        self.bare_model = model.to(accelerator.device)
        self.model, self.optimizer = accelerator.prepare(model, build_optimizer(model, settings))
        # Steps are under autocast; what is evaluated is what is saved, in float32: without Accelerate's own autocast.
        accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.step = self.epoch = self.batch = 0
        self.best: float | None = None
        self.evaluated_step = -1
        self.metrics: dict[str, dict[str, float]] = {}
        self._signals = StopSignals(enabled=False)

    def start(self, origin: str, *notes: str) -> TrainingResult:
        """Claim the run's folder, announce what it starts from, `notes`, how long and how fast it is, and run.

        Everything else is known to fit by now: --overwrite deletes a run.

        Raises:
            UserError: the folder belongs to another run; and as `run`.
        """
        settings, processes, main = self.settings, self.accelerator.num_processes, self.accelerator.is_main_process
        with self.folder.held() if main else nullcontext():
            if main:
                self.folder.claim(self.identity, resume=settings.resume, overwrite=settings.overwrite)
                for line in (*([] if settings.resume else [f"start from {origin}"]), *notes):
                    self.announce(line)
                self.announce(
                    f"{self.total_steps} steps of {settings.batch_size * processes} images ({processes} x "
                    f"{settings.batch_size}), {self.steps_per_epoch} steps an epoch, learning rate {self.peak_lr:g}, "
                    f"on {self.accelerator.device}, precision {self.accelerator.mixed_precision}"
                )
            self.accelerator.wait_for_everyone()
            return self.run()

    def run(self) -> TrainingResult:
        """Train to the end, from the saved state with `settings.resume`.

        A single process finishes its step on SIGINT or SIGTERM, saves its state and raises KeyboardInterrupt.

        Raises:
            NonFiniteLossError: the loss or the gradient is not finite; the batch is in non_finite.json.
            UserError: the folder's state belongs to a run with other settings.
        """
        main = self.accelerator.is_main_process
        if self.settings.resume:
            saved = self.folder.state.exists()
            if saved:
                state = load_state(self.folder.state, self.identity)
                try:
                    self._restore(state)
                except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:  # as torch finds it
                    raise broken_state(self.folder.state) from error
            if main:
                where = f"the state in {self.folder.state}" if saved else "no state was saved yet"
                self.announce(f"continues at step {self.step} ({where})")
        if len(set(gather_object([self.step]))) > 1:
            raise UserError(f"{self.folder.root}: not every process sees its state; put --out on a shared disk")
        show = main and self.settings.progress
        bar = progress_bar(desc="training", total=self.total_steps, initial=self.step, unit="step", show=show)
        log = RunLog(
            self.folder,
            first_step=self.step,
            evaluated_step=self.evaluated_step,
            enabled=main,
            tracker=self.settings.tracker,
        )
        with worker_deaths(), log, bar, StopSignals(enabled=self.accelerator.num_processes == 1) as self._signals:
            while self.step < self.total_steps:
                self._run_epoch(log, bar)
            if self.evaluated_step < self.step:  # killed after the last step, before its evaluation
                self._evaluate(log)
                self._save_state()
        return TrainingResult(self.step, self.metrics, self.best)

    def _run_epoch(self, log: RunLog, bar: "tqdm[Any]") -> None:
        """The rest of the current epoch, then what is due at its end."""
        settings = self.settings
        log.start_interval()
        self.model.train()  # FrozenBatchNorm2d has no training mode: a frozen backbone stays as it is
        for batch in self.loader.batches(self.epoch, self.batch):
            losses, norm, lr = self._train_step(batch.to(self.accelerator.device))
            self.step += 1
            self.batch += 1
            log.add_step(losses, len(batch.image_ids) * self.accelerator.num_processes)
            bar.update()
            bar.set_postfix(loss=f"{losses['total']:.3f}", lr=f"{lr:.2g}", refresh=False)
            if self.step % settings.log_every == 0 or self.step == self.total_steps:
                memory_mib = self._peak_memory_mib()
                log.write_interval(self.step, epoch=self.epoch, lr=lr, gradient_norm=norm, memory_mib=memory_mib)
            if self.step % settings.state_every == 0:
                self._save_state()
            if self.step == self.total_steps:
                break
            if self._signals.received:
                self._save_state()
                self.announce(f"stopped after step {self.step}; its state is saved, --resume goes on from there")
                raise KeyboardInterrupt
        ended = self.batch == self.steps_per_epoch
        if ended:
            self.epoch, self.batch = self.epoch + 1, 0
        every = settings.evaluate_every
        if self.step == self.total_steps or (ended and every and self.epoch % every == 0):
            self._evaluate(log)
        elif self.accelerator.is_main_process:
            self.save_model(self.folder.last, self.bare_model)
        self._save_state()

    def _train_step(self, batch: Batch) -> tuple[dict[str, float], float, float]:
        """One optimizer step; returns the processes' mean losses, the gradient's norm and the rate."""
        settings, accelerator = self.settings, self.accelerator
        lr = settings.learning_rate(
            self.step, peak=self.peak_lr, total_steps=self.total_steps, steps_per_epoch=self.steps_per_epoch
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        seed_step(settings.seed, self.step, accelerator.process_index)
        with accelerator.autocast():
            terms = dict(self.loss_terms(self.model, batch))
        terms["total"] = total = torch.stack([term.float() for term in terms.values()]).sum()
        values = torch.stack([term.detach().float() for term in terms.values()])
        own = dict(zip(terms, values.tolist(), strict=True))
        # a non-finite loss on any process makes the mean non-finite on all, so they stop together
        means = dict(zip(terms, accelerator.reduce(values.clone(), "mean").tolist(), strict=True))
        if not all(map(math.isfinite, means.values())):
            self._stop(batch, own)
        self.optimizer.zero_grad()
        accelerator.backward(total)
        limit = math.inf if settings.clip_norm is None else settings.clip_norm
        norm = float(accelerator.clip_grad_norm_(self.model.parameters(), limit))
        # with fp16 an overflow is ordinary: the scaler skips the step and lowers its scale
        if not math.isfinite(norm) and accelerator.scaler is None:
            self._stop(batch, {**own, "gradient_norm": norm})
        self.optimizer.step()
        return means, norm, lr

    def _stop(self, batch: Batch, terms: dict[str, float]) -> None:
        """Save the batches of all processes and raise."""
        losses = {name: str(value) for name, value in terms.items()}
        everyone = gather_object([{"image_ids": list(batch.image_ids), "losses": losses}])
        if self.accelerator.is_main_process:
            with atomic_write(self.folder.non_finite, "w") as stream:
                stream.write(json.dumps({"step": self.step, "processes": everyone}, indent=2) + "\n")
        self.accelerator.wait_for_everyone()
        bad = [entry for entry in everyone if not all(math.isfinite(float(v)) for v in entry["losses"].values())]
        worst = bad[0] if bad else everyone[0]
        names = [name for name, value in worst["losses"].items() if not math.isfinite(float(value))]
        raise NonFiniteLossError(
            f"step {self.step}: {', '.join(names)} is not finite for image ids "
            f"{', '.join(map(str, worst['image_ids']))}; details in {self.folder.non_finite}; "
            "look at these images' annotations, or lower --lr, or set --clip-norm"
        )

    def _peak_memory_mib(self) -> float:
        """Peak memory of the main process: of the GPU, or resident on a CPU."""
        if self.accelerator.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    def _evaluate(self, log: RunLog) -> None:
        """Evaluate, log, and write the last and, if the score is a new best, the best checkpoint."""
        model = self.bare_model.eval()
        with torch.no_grad():
            evaluation = self.evaluate(model)
        self.metrics, self.evaluated_step = evaluation.metrics, self.step
        log.write("evaluation", self.step, {"epoch": self.epoch, **evaluation.metrics})
        better = self.best is None or evaluation.score > self.best
        self.best = evaluation.score if better else self.best
        if self.accelerator.is_main_process:
            self.save_model(self.folder.last, model)
            if better:
                self.save_model(self.folder.best, model)
        self.accelerator.wait_for_everyone()

    def _save_state(self) -> None:
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = RunState(
            step=self.step,
            epoch=self.epoch,
            batch=self.batch,
            best=self.best,
            evaluated_step=self.evaluated_step,
            metrics=self.metrics,
            identity=self.identity,
            model=self.bare_model.state_dict(),
            optimizer=self.optimizer.state_dict(),
            scaler=None if scaler is None else scaler.state_dict(),
        )
        save_state(self.folder.state, state)

    def _restore(self, state: RunState) -> None:
        self.step, self.epoch, self.batch = state.step, state.epoch, state.batch
        self.best, self.evaluated_step, self.metrics = state.best, state.evaluated_step, state.metrics
        self.bare_model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.optimizer)
        if self.accelerator.scaler is not None and state.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
