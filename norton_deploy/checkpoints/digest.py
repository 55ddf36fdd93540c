"""The one digest of tensors: what a checkpoint, a graph and a result file say about the weights they are of."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def tensors_digest(tensors: Mapping[str, Tensor], prefix: bytes = b"") -> str:
    """SHA-256 over every tensor's name, type, shape and bytes, by names ascending; 64 hexadecimal digits.

    Args:
        tensors: on any device, for example a model's `state_dict()`.
        prefix: bytes that come first.
    """
    digest = hashlib.sha256(prefix)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
