"""Training a classifier on images that lie where it computes: on a GPU a step is one replay of a recorded graph."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from norton_deploy.compression.cpd_block import CPDBlock
from norton_deploy.data.resident_images import Augmentation, ResidentImages
from norton_deploy.training.batches import GroupedBatchSampler
from norton_deploy.training.forms import M, recompose_blocks
from norton_deploy.training.settings import parameter_groups

EVALUATION_BATCH = 2000
EAGER_STEPS = 3  # before the graph is recorded: they allocate memory and choose convolution algorithms
Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(logits [N, K] float32, labels [N], the teacher's logits [N, K] or None) -> scalar."""


@dataclass(frozen=True)
class ResidentSettings:
    """Attributes: images a step; peak learning rate; Nesterov momentum; decay of kernels and matrices, and whether
    factors have it too; largest norm of the gradient; epochs of linear warm-up, after which the rate falls along half a
    cosine; at most so many epochs."""

    batch_size: int = 512
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    factor_decay: bool = True
    clip_norm: float = 5.0
    warmup_epochs: int = 5
    epochs: int = 100


class NesterovSGD:
    """torch.optim.SGD(nesterov=True) with clipping, its learning rate a tensor, so that a recorded step can follow it.

    Attributes:
        parameters: those trained.
        lr: scalar on their device; fill it before a step.
    """

    def __init__(self, model: nn.Module, settings: ResidentSettings) -> None:
        self.parameters: list[Tensor] = [part for part in model.parameters() if part.requires_grad]
        self.settings = settings
        self.lr = torch.zeros((), device=self.parameters[0].device)
        self._velocity = [torch.zeros_like(parameter) for parameter in self.parameters]
        groups = parameter_groups(model, settings.weight_decay, factor_decay=settings.factor_decay)
        decayed = {id(parameter) for parameter in groups[0]["params"]}
        self._decayed = [index for index, parameter in enumerate(self.parameters) if id(parameter) in decayed]

    @torch.no_grad()
    def step(self, gradients: tuple[Tensor, ...]) -> None:
        """One step along the gradients of `parameters`, which it changes."""
        # equal strides: the operations on lists are one kernel each then, not one a tensor
        grads = [
            grad if grad.stride() == parameter.stride() else torch.empty_like(parameter).copy_(grad)
            for grad, parameter in zip(gradients, self.parameters, strict=True)
        ]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (self.settings.clip_norm / (norm + 1e-6)).clamp(max=1))
        decayed = [self.parameters[index] for index in self._decayed]
        torch._foreach_add_([grads[index] for index in self._decayed], decayed, alpha=self.settings.weight_decay)
        torch._foreach_mul_(self._velocity, self.settings.momentum)
        torch._foreach_add_(self._velocity, grads)
        torch._foreach_add_(grads, self._velocity, alpha=self.settings.momentum)
        torch._foreach_mul_(grads, self.lr)
        torch._foreach_add_(self.parameters, grads, alpha=-1)


def bfloat16_on_gpu(device: torch.device) -> torch.autocast:
    """Mixed precision on a GPU, nothing on a CPU; without a cache of weights, which a recorded step must not read."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)


class TrainingStep:
    """Forward, backward and update on fixed buffers. On a GPU it is recorded once and then replayed, which spares some
    thousand launches; if recording fails, it goes on unrecorded and says so.

    Attributes:
        pixels, labels, teacher: the batch; copy the next one in.
        loss_sum: sum of the losses since it was last zeroed.
        recorded: whether steps are replays.
    """

    def __init__(
        self, model: nn.Module, images: ResidentImages, loss: Loss, optimizer: NesterovSGD, batch: tuple[Tensor, ...]
    ) -> None:
        self._model, self._images, self._loss, self._optimizer = model, images, loss, optimizer
        self.pixels, self.labels, *rest = (part.clone() for part in batch)
        self.teacher = rest[0] if rest else None
        self.loss_sum = torch.zeros((), device=self.pixels.device)
        self._eager_steps = EAGER_STEPS if self.pixels.is_cuda else sys.maxsize
        self._graph: Any = None

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def __call__(self, batch: tuple[Tensor, ...]) -> None:
        """Train on a batch as large as the first."""
        for buffer, part in zip((self.pixels, self.labels, self.teacher), batch, strict=False):
            assert buffer is not None
            buffer.copy_(part)
        if self._graph is None and self._eager_steps == 0:
            self._record()
        if self._graph is not None:
            self._graph.replay()
            return
        self._eager_steps -= 1
        if not self.pixels.is_cuda:
            self._run()
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._run()
        torch.cuda.current_stream().wait_stream(stream)

    def _record(self) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph):
                self._run()
            self._graph = graph
        except RuntimeError as error:
            print(f"this step cannot be recorded, it runs as it is: {error}", file=sys.stderr, flush=True)
            torch.cuda.set_stream(stream)  # a recording that breaks off leaves its own behind
            torch.cuda.synchronize()
            self._eager_steps = sys.maxsize

    def _run(self) -> None:
        with bfloat16_on_gpu(self.pixels.device):
            logits = self._model(self._images.normalised(self.pixels))
        loss = self._loss(logits.float(), self.labels, self.teacher)
        self._optimizer.step(torch.autograd.grad(loss, self._optimizer.parameters))
        self.loss_sum += loss.detach()


def train_resident(
    model: nn.Module,
    images: ResidentImages,
    held_out: ResidentImages,
    loss: Loss,
    settings: ResidentSettings,
    *,
    seed: int,
    seconds: float,
    teacher: Callable[[int, Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Train in place, for as many epochs as fit into the time: the second one, which is timed, decides how many.

    Args:
        model, images, held_out: on one device.
        loss: of a batch.
        settings: batch, learning rate and so on.
        seed: of order and augmentation.
        seconds: time to fill, `settings.epochs` being the most that is trained; infinite: exactly those.
        teacher: (epoch, pixels of the whole epoch) -> its logits for them.

    Returns:
        What was done, and top1_each_epoch on `held_out` (0..1, in the precision of the training).

    Raises:
        FloatingPointError: the loss is not finite.
    """
    started = time.perf_counter()
    batch_size = min(settings.batch_size, len(images))
    sampler = GroupedBatchSampler(len(images), batch_size, seed=seed)
    steps_per_epoch, epochs = len(sampler), settings.epochs
    optimizer = NesterovSGD(model, settings)
    step: TrainingStep | None = None
    top1_each_epoch: list[float] = []
    epoch, begun, epoch_s, loss_mean = 0, started, 0.0, math.nan
    while epoch < epochs:
        sampler.set_epoch(epoch)
        order = torch.from_numpy(sampler.epoch_batches().ravel()).to(images.labels.device)
        data: tuple[Tensor, ...] = (Augmentation(images, seed, epoch)(order), images.labels[order])
        if teacher is not None:
            data = (*data, teacher(epoch, data[0]))
        model.train()
        for index in range(steps_per_epoch):
            batch = tuple(part[index * batch_size : (index + 1) * batch_size] for part in data)
            step = step or TrainingStep(model, images, loss, optimizer, batch)
            optimizer.lr.fill_(learning_rate(settings, epoch + index / steps_per_epoch, epochs))
            step(batch)
        assert step is not None
        loss_mean = float(step.loss_sum) / steps_per_epoch
        step.loss_sum.zero_()
        if not math.isfinite(loss_mean):
            raise FloatingPointError(f"the loss is {loss_mean} in epoch {epoch} at a learning rate of {settings.lr}")
        top1_each_epoch.append(round(top1_of(model, held_out), 4))
        epoch += 1
        now = time.perf_counter()
        epoch_s, begun = now - begun, now
        if epoch == 2 and math.isfinite(seconds):
            fitting = 2 + int((seconds - (now - started)) / epoch_s)
            epochs = max(min(epochs, fitting), min(epochs, settings.warmup_epochs + 1))
            print(f"an epoch takes {epoch_s:.3f} s: {epochs} epochs", file=sys.stderr, flush=True)
    return {
        "epochs": epochs,
        "images_seen": epochs * steps_per_epoch * batch_size,
        "batch_size": batch_size,
        "lr": settings.lr,
        "epoch_s": round(epoch_s, 3),
        "training_s": round(time.perf_counter() - started, 1),
        "recorded": step is not None and step.recorded,
        "loss": round(loss_mean, 4),
        "top1_each_epoch": top1_each_epoch,
    }


def learning_rate(settings: ResidentSettings, epoch: float, epochs: int) -> float:
    """Linear warm-up from a tenth, then half a cosine down to 0; `epoch` counts fractions too."""
    warmup = min(settings.warmup_epochs, epochs - 1)
    if epoch < warmup:
        return settings.lr * (0.1 + 0.9 * epoch / warmup)
    return settings.lr * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2


@torch.no_grad()
def logits_of(model: nn.Module, pixels: Tensor, images: ResidentImages, *, exact: bool = False) -> Tensor:
    """Logits float32 [N, K] of uint8 [N, H, W, 3], normalised as `images` are, in evaluation mode; in float32 if exact,
    else as in training."""
    was_training = model.training
    model.eval()
    logits = []
    for part in pixels.split(EVALUATION_BATCH):
        if exact:
            logits.append(model(images.normalised(part)))
        else:
            with bfloat16_on_gpu(pixels.device):
                logits.append(model(images.normalised(part)).float())
    model.train(was_training)
    return torch.cat(logits)


def top1_of(model: nn.Module, images: ResidentImages, *, exact: bool = False) -> float:
    """Top-1 accuracy, 0..1; see `logits_of`."""
    found = logits_of(model, images.pixels, images, exact=exact).argmax(dim=1)
    return float((found == images.labels).float().mean())


@torch.no_grad()
def use_gpu_forms(model: M) -> M:
    """Recompose all CPDBlocks and move biases that a BatchNorm follows into its mean, in place; returns the model.

    Such a bias changes nothing in training but costs a pass over the maps there and one back.
    """
    recompose_blocks(model)
    for layer, norm in _normalised_layers(model):
        if isinstance(layer.bias, Tensor):
            cast(Tensor, norm.running_mean).sub_(layer.bias)
            layer.register_parameter("bias", None)
    return model.to(memory_format=torch.channels_last)


def _normalised_layers(model: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Layers with weights and the BatchNorm right behind them, in the Sequentials of a model."""
    for parent in model.modules():
        if isinstance(parent, nn.Sequential):
            for layer, norm in pairwise(parent):
                if isinstance(layer, nn.Conv2d | nn.Linear | CPDBlock) and isinstance(
                    norm, nn.modules.batchnorm._BatchNorm
                ):
                    yield layer, norm
