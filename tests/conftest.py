"""Fixtures that every test folder shares."""

from pathlib import Path

import pytest

from norton_deploy.data.synthetic.dataset import write_dataset


@pytest.fixture(scope="session")
def tiny_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a small embedded dataset in COCO's layout: 6 train and 4 val images of 112-144 px. Read only."""
    root = tmp_path_factory.mktemp("coco") / "tiny"
    write_dataset(root, 6, 4, seed=3, image_sizes=(112, 144))
    return root
