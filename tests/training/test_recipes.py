from pathlib import Path

import pytest

from norton_deploy.commands import train_cls, train_det
from norton_deploy.config import parse_settings, read_yaml

RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_fit_their_commands(recipe):
    command = train_det if "task" in read_yaml(recipe) else train_cls
    arguments = ["--config", str(recipe), "--data", "data", "--out", "run"]
    settings = parse_settings(command.Settings, arguments, prog="test", description="")
    assert recipe.stem.startswith("coco") <= (settings.peak_lr(16) == 0.02)


def test_the_1x_schedule_of_16_images_a_step():
    """COCO-2017 has 118,287 training images: 7,393 steps of 16 an epoch."""
    recipe = next(path for path in RECIPES if path.stem == "coco_box")
    arguments = ["--config", str(recipe), "--data", "data", "--out", "run"]
    settings = parse_settings(train_det.Settings, arguments, prog="test", description="")
    assert settings.total_steps(7393) == 88716
    assert (settings.milestones, settings.warmup_steps, settings.peak_lr(16)) == ((8, 11), 1000, 0.02)


@pytest.mark.parametrize("task", ["box", "mask"])
def test_the_authors_26_epochs(task):
    recipe = next(path for path in RECIPES if path.stem == f"coco_{task}")
    told = "--epochs 26 --milestones 16 22"
    assert told in recipe.read_text().replace("\n# ", " ")
    arguments = ["--config", str(recipe), "--data", "data", "--out", "run", *told.split()]
    settings = parse_settings(train_det.Settings, arguments, prog="test", description="")
    rates = [
        settings.learning_rate(epoch * 7393, peak=0.02, total_steps=0, steps_per_epoch=7393) for epoch in (15, 16, 22)
    ]
    assert settings.total_steps(7393) == 26 * 7393 and rates == pytest.approx([0.02, 0.002, 0.0002])
