"""Top-1 and top-5 accuracy of a classifier, on one process or many."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from norton_deploy.compression.lowering import lower_model, quickest_forms
from norton_deploy.data.classification import ClassificationFolder
from norton_deploy.data.loading import iterate


@torch.no_grad()
def evaluate_classifier(
    model: nn.Module,
    dataset: ClassificationFolder,
    device: torch.device,
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Accuracy over a dataset; every process calls this and sees every n-th image, none of them twice.

    Args:
        model: images [N, 3, H, W] -> logits [N, K], in evaluation mode, on `device`. What runs is a copy with
            CPDBlocks and BatchNorm merged, which gives the same scores to rounding in less time.
        dataset: items (image, label, name), not augmented.
        device: where the model is.
        batch_size: images per forward pass.
        workers: processes that decode images.
        progress: show a bar on the main process.

    Returns:
        top1 and top5, 0..1. With fewer than five classes top5 is 1.
    """
    model = lower_model(model, forms=quickest_forms(model))
    state = PartialState(cpu=device.type == "cpu")
    own = Subset(dataset, range(state.process_index, len(dataset), state.num_processes))
    hits = torch.zeros(2, dtype=torch.int64)
    loader = DataLoader(own, batch_size, num_workers=workers)
    hidden = not (progress and state.is_main_process)
    bar = tqdm(iterate(loader), "evaluating", len(loader), leave=False, dynamic_ncols=True, disable=hidden)
    for images, labels, _ in bar:
        logits = model(images.to(device))
        ranking = logits.topk(min(5, logits.shape[1])).indices.cpu()
        correct = ranking == labels[:, None]
        hits += torch.stack([correct[:, 0].sum(), correct.sum()])
    top1, top5 = torch.tensor(gather_object([hits.tolist()])).sum(0).tolist()
    return {"top1": top1 / len(dataset), "top5": top5 / len(dataset)}
