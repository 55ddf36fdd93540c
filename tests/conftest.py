"""What every test folder shares: one thread a worker, and things that are made once for all workers."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from norton_deploy.data.synthetic import write_dataset

Once = Callable[[str, Callable[[Path], None]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Once:
    """(name, make) -> the file or folder `name`, which `make(path)` wrote, once for all workers. Read only."""
    own = tmp_path_factory.getbasetemp()
    root = (own if worker_id == "master" else own.parent) / "once"
    root.mkdir(exist_ok=True)

    def path_of(name: str, make: Callable[[Path], None]) -> Path:
        path = root / name
        with FileLock(root / f"{name}.lock"):
            if not (root / f"{name}.made").exists():
                make(path)
                (root / f"{name}.made").touch()
        return path

    return path_of


@pytest.fixture(scope="session")
def tiny_coco(once: Once) -> Path:
    """Root of a small embedded dataset in COCO's layout: 6 train and 4 val images of 112-144 px. Read only."""
    return once("tiny_coco", lambda root: write_dataset(root, 6, 4, seed=3, image_sizes=(112, 144)))


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
