"""One training run: what every task does once it has its model, data and loss."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
from accelerate import Accelerator
from torch import Tensor, nn

from norton_deploy.data.samplers import GroupedBatchSampler
from norton_deploy.training.batch import Batch, Evaluation
from norton_deploy.training.cpu_forms import use_cpu_forms
from norton_deploy.training.gpu_forms import recompose_blocks
from norton_deploy.training.initial_weights import InitialModel
from norton_deploy.training.loaders import EpochDataset, SampledBatches
from norton_deploy.training.run_folder import RunFolder
from norton_deploy.training.settings import TrainingSettings
from norton_deploy.training.trainer import Trainer, TrainingResult

LossTerms = Callable[[nn.Module, Batch], Mapping[str, Tensor]]


def run_training(
    settings: TrainingSettings,
    accelerator: Accelerator,
    start: InitialModel,
    train: EpochDataset,
    collate: Callable[[list[Any]], Batch],
    *,
    loss_terms: LossTerms,
    evaluate: Callable[[nn.Module], Evaluation],
    save_model: Callable[[Path, nn.Module], None],
    identity: Mapping[str, Any],
    announce: Callable[[str], None],
    notes: Sequence[str] = (),
    image_sizes: npt.ArrayLike | None = None,
) -> TrainingResult:
    """Claim the run's folder once everything fits, then train, evaluate and save.

    Args:
        settings: of the run.
        accelerator: of its processes.
        start: the model to train.
        train: its images and targets.
        collate: list of their items -> Batch.
        loss_terms: (model in training mode, batch) -> the loss's terms.
        evaluate: model -> metrics and the score that the best checkpoint has.
        save_model: writes a checkpoint.
        identity: what a resumed run must have in common with its beginning, beside `settings.identity()`.
        announce: called on the main process with what the run starts from and how.
        notes: further lines to announce.
        image_sizes: [images, 2] heights and widths for batches of alike aspect ratio.

    Raises:
        UserError: the folder belongs to another run, or the loss is not finite.
    """
    if settings.cpu_forms:
        use_cpu_forms(start.model)
    if settings.recompose_blocks:
        recompose_blocks(start.model)
    identity = {**settings.identity(), **identity, "training_images": len(train)}
    sampler = GroupedBatchSampler(
        len(train),
        settings.batch_size,
        image_sizes=image_sizes,
        seed=settings.seed,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
    )
    trainer = Trainer(
        accelerator=accelerator,
        model=start.model,
        loss_terms=loss_terms,
        loader=SampledBatches(train, sampler, collate, settings.workers),
        settings=settings,
        evaluate=evaluate,
        save_model=save_model,
        identity=identity,
        announce=announce,
    )
    if accelerator.is_main_process:  # now that everything else is known to fit: --overwrite deletes a run
        RunFolder(settings.out).claim(identity, resume=settings.resume, overwrite=settings.overwrite)
        for line in (*(() if settings.resume else (f"start from {start.origin}",)), *notes, trainer.summary()):
            announce(line)
    accelerator.wait_for_everyone()
    return trainer.run()
