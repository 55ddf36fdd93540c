"""Where a pass over a model may begin: behind the layers that no longer change.

A refit goes through a model layer by layer, each with new passes over the same probes. What lies before the layer is
final, so its outputs are kept and not computed again. Passes would otherwise cost the square of the depth.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from norton_deploy.compression.channel_groups import is_detector
from norton_deploy.models.detector_parts import STAGES

LARGE = 2**20
"""Numbers in a map from which on it is kept in half precision; smaller ones stay as they are."""
LARGEST_HALF = 6e4
POOLS = ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool")


@dataclass
class _Unit:
    """A module whose output only the next unit reads, unless it is `held` for others as well."""

    name: str
    held: bool = False
    store: dict[int, Tensor] = field(default_factory=dict)


class Frontier:
    """Keeps the outputs of a model's final units while it is open; set `probe` before each pass.

    Attributes:
        probe: number of the probe that the next pass is for.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.probe = model, 0
        self._units = list(_units(model))
        self._last = -1
        self._reached: dict[int, int] = {}
        self._pools: dict[str, dict[int, Tensor]] = {}
        self._wrapped: list[nn.Module] = []

    def __enter__(self) -> Self:
        for index, unit in enumerate(self._units):
            self._wrap(unit.name, partial(self._run_unit, index))
        return self

    def __exit__(self, *_exception: object) -> None:
        for module in self._wrapped:
            del module.forward
        self._wrapped.clear()
        for unit in self._units:
            unit.store.clear()
        self._pools.clear()

    def advance(self, pending: Collection[str], fill: Callable[[], None]) -> None:
        """Tell which layers will still change.

        Args:
            fill: runs the model on every probe.
        """
        while self._last + 1 < len(self._units) and not _holds(self._units[self._last + 1].name, pending):
            self._last += 1
        if not is_detector(self.model) or self._pools or any(_holds(part, pending) for part in ("backbone", "rpn")):
            return
        for pool in POOLS:
            if getattr(self.model.roi_heads, pool, None) is not None:
                self._wrap(f"roi_heads.{pool}", partial(self._run_pool, pool))
                self._pools[pool] = {}
        fill()
        for unit in self._units:
            unit.store.clear()
        self._wrap("backbone", lambda _original, *_inputs: {})  # the pools know all that is read of it

    def _wrap(self, name: str, run: Callable[..., Any]) -> None:
        module: Any = self.model.get_submodule(name)
        module.forward = partial(run, module.forward)
        self._wrapped.append(module)

    def _run_unit(self, index: int, original: Callable[..., Any], *inputs: Any) -> Any:
        unit = self._units[index]
        if index > self._last:
            return original(*inputs)
        if self.probe in unit.store and (unit.held or self._reached[self.probe] <= index):
            return unit.store[self.probe].float()
        if self._reached.get(self.probe, -1) > index:
            unit.store.pop(self.probe, None)
            return inputs[0]  # the next unit does not look at it
        output = original(*inputs)
        if index == self._last or unit.held:
            unit.store[self.probe] = _packed(output)
            self._reached[self.probe] = index
            return unit.store[self.probe].float()
        return output

    def _run_pool(self, pool: str, original: Callable[..., Any], *inputs: Any) -> Any:
        store = self._pools[pool]
        if self.probe not in store:
            store[self.probe] = _packed(original(*inputs))
        return store[self.probe].float()


def _units(model: nn.Module) -> list[_Unit]:
    """The units of a ResNet, of a detector's ResNet or of a VGG's features, in the order of the data."""
    prefix = "backbone.body." if is_detector(model) else ""
    body = model.get_submodule("backbone.body") if is_detector(model) else model
    if hasattr(body, "features"):
        return [_Unit(f"features.{name}") for name, _ in body.get_submodule("features").named_children()]
    units = []
    for name, child in body.named_children():
        if name in STAGES:
            blocks = [f"{prefix}{name}.{index}" for index, _ in child.named_children()]
            units += [_Unit(block, held=is_detector(model) and block == blocks[-1]) for block in blocks]
        elif name in ("conv1", "bn1", "relu", "maxpool"):
            units.append(_Unit(prefix + name))
    return units


def _holds(unit: str, pending: Collection[str]) -> bool:
    return any(name == unit or name.startswith(f"{unit}.") for name in pending)


def _packed(output: Tensor) -> Tensor:
    if output.numel() < LARGE:
        return output
    return output.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16)
