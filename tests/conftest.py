"""What every test folder shares: one thread a worker, and things that are made once for all workers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import copy
import functools
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torchvision.models import resnet

from norton_deploy.data.synthetic import write_dataset

Once = Callable[[str, Callable[[Path], None]], Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: no worker waits at the end for a long one. Slow tests run without coverage, which
    makes the Python of torch's exporters and compilers take twice as long."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    for item in slow:
        item.add_marker("no_cover")
    first = {item.path for item in slow}
    items.sort(key=lambda item: item.path not in first)


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """(name, make) -> the file or folder `name`, which `make(path)` wrote, once for all workers, without coverage. Read
    only."""
    own = tmp_path_factory.getbasetemp()
    root = (own if worker_id == "master" else own.parent) / "once"
    root.mkdir(exist_ok=True)

    def path_of(name: str, make: Callable[[Path], None]) -> Path:
        path = root / name
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.made").exists():
                tracer = sys.gettrace()
                sys.settrace(None)
                try:
                    make(path)
                finally:
                    sys.settrace(tracer)
                (root / f"{name}.made").touch()
        return path

    return path_of


@pytest.fixture(scope="session", autouse=True)
def onnx_operators_read_once() -> Iterator[None]:
    """torch reads the definitions of all ONNX operators again for every export, which is most of a small one's time."""
    read = ONNXRegistry.from_torchlib
    first = functools.cache(read)

    def copied(*arguments: Any, **named: Any) -> ONNXRegistry:
        registry = copy.copy(first(*arguments, **named))
        registry.functions = {name: list(forms) for name, forms in registry.functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


@pytest.fixture(scope="session")
def tiny_coco(once: Once) -> Path:
    """Root of a small embedded dataset in COCO's layout: 6 train and 4 val images of 112-144 px. Read only."""
    return once("tiny_coco", lambda root: write_dataset(root, 6, 4, seed=3, image_sizes=(112, 144)))


class NarrowResNet(resnet.ResNet):
    """A ResNet with a quarter of its channels behind the stem."""

    def __init__(self, block: type[Any], layers: list[int], num_classes: int = 1000, **settings: Any) -> None:
        super().__init__(block, layers, num_classes=num_classes, **settings)
        self.fc = nn.Linear(128 * block.expansion, num_classes)

    def _make_layer(self, block: type[Any], planes: int, *arguments: Any, **options: Any) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *arguments, **options)


@pytest.fixture
def narrow_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNets that are built here are narrow: closed-form fits of 512 channels by 9 positions take half a minute."""
    monkeypatch.setattr(resnet, "resnet18", partial(NarrowResNet, resnet.BasicBlock, [2, 2, 2, 2]))
    monkeypatch.setattr(resnet, "resnet50", partial(NarrowResNet, resnet.Bottleneck, [3, 4, 6, 3]))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in another order are other bits: all runs that are compared have one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Playwright's handle on the system's Chromium, without a window."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pages are not looked at"
    )
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium here (apt install chromium): pages are not looked at")
    with playwright.sync_playwright() as handle:
        opened = handle.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()
