"""What each part of a fine-tuning recipe is worth: a compressed VGG-16 recovered with one part changed at a time.

The plan's model is compressed, refitted on unlabelled images and gets new BatchNorm statistics once; every recipe
starts from these weights, has the dense model as teacher and sees the same images in equally many steps. "Two stages"
decomposes first, fine-tunes for half of the steps, prunes and fine-tunes for the other half, as the paper's code does;
its first stage is a larger model. Finished cells stay, an interrupted fine-tuning goes on: run the same command again.

    python benchmarks/recipes.py --model runs/vgg16/last.safetensors --data runs/cifar --precision bf16
"""

import copy
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import mean
from typing import Any

from torch import nn

from benchmarks.lib.cells import PLANS, RESULTS, Cell, ResultCells, page, run, tabulate
from benchmarks.lib.classifier_recovery import Recovery, RecoverySettings, Teacher, digest_of, fine_tuning, percent
from benchmarks.lib.rival_choices import choose_living_by_angles
from benchmarks.lib.training_runs import LAST
from norton_deploy.checkpoints.checkpoint import load_checkpoint, save_checkpoint
from norton_deploy.compression.calibration import make_probes, reestimate_batch_norm
from norton_deploy.compression.compress import compress, compress_with_kept
from norton_deploy.compression.refit import refit
from norton_deploy.data.image_folder import read_images
from norton_deploy.method.plan import CompressionPlan

PROBE_BATCH = 200
CONTROL, TWO_STAGES = "control", "two stages"
RECIPES: dict[str, dict[str, Any]] = {
    CONTROL: {},
    "factors without decay": {"factor_decay": False},
    "labels smoothed by 0.1": {"label_smoothing": 0.1},
    TWO_STAGES: {},
    "cut out 8 px": {"cutout": 8},
}
"""What each changes of the control."""


@dataclass(frozen=True, kw_only=True)
class Settings(RecoverySettings):
    """Settings of benchmarks/recipes.py."""

    runs: Path = Path("runs/recipes")
    """Folder for the fine-tuning runs; an interrupted one is continued."""
    plan: Path = PLANS / "vgg16_96.yaml"
    """Plan to recover from."""
    recipes: tuple[str, ...] = tuple(RECIPES)
    """Which recipes."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of order and augmentation, one cell of every recipe for each."""
    batch_size: int = 64
    """Images per step."""
    distillation_weight: float = 0.7
    """Weight of the dense model's scores in the control; the labels have the rest."""
    temperature: float = 4.0
    """Temperature of the control's distillation."""
    refit_images: int = 2000
    """Unlabelled training images for the refit by least squares before fine-tuning."""
    out: Path = RESULTS / "recipes.json"
    """Results file; a Markdown table is written beside it."""


class Recipes:
    """Compressed starts of one plan, and their recoveries."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.recovery = settings, Recovery(settings)
        self.plan = CompressionPlan.load(settings.plan)
        self.teacher = Teacher(settings.model, settings.distillation_weight, settings.temperature)

    @cached_property
    def start(self) -> nn.Module:
        """The plan's model."""
        return self._compressed(self.plan, "start")

    @cached_property
    def decomposed(self) -> nn.Module:
        """The plan's model before pruning."""
        return self._compressed(replace(self.plan, keep={}), "decomposed")

    def _compressed(self, plan: CompressionPlan, name: str) -> nn.Module:
        s, recovery = self.settings, self.recovery
        file = s.runs / f"{name}-{digest_of(recovery.identity(), plan.to_dict(), s.refit_images)}.safetensors"
        if not file.is_file():
            found = compress_with_kept(recovery.dense, plan, seed=s.seed)
            images = read_images(s.data / "train", s.refit_images)
            probes = list(make_probes(recovery.dense, images, recovery.settings, batch=PROBE_BATCH))
            refit(found.model, recovery.dense, found.kept, probes, seed=s.seed)
            self._reestimate(found.model)
            save_checkpoint(file, found.model, recovery.header.made_by("benchmarks/recipes.py", s.model, plan=plan))
        return load_checkpoint(file).model

    def _reestimate(self, model: nn.Module) -> None:
        images = read_images(self.settings.data / "train", self.settings.reestimate_images)
        reestimate_batch_norm(model, images, self.recovery.settings)

    def measure(self, recipe: str, seed: int) -> Cell:
        """Top-1 (0..1) of the start, and after the recipe."""
        tune = partial(self.recovery.run, name=f"{recipe} {seed}", seed=seed, teacher=self.teacher)
        if recipe != TWO_STAGES:
            _, top1 = tune(copy.deepcopy(self.start), self.plan, **RECIPES[recipe])
            return {"recipe": recipe, "seed": seed, "changes": RECIPES[recipe], "top1": top1}
        first, second = self.settings.steps - self.settings.steps // 2, self.settings.steps // 2
        out, top1_decomposed = tune(copy.deepcopy(self.decomposed), replace(self.plan, keep={}), steps=first)
        tuned = load_checkpoint(out / LAST).model
        small = compress(tuned, replace(self.plan, ranks={}), choose=choose_living_by_angles)
        self._reestimate(small)
        _, top1 = tune(small, self.plan, steps=second)
        return {"recipe": recipe, "seed": seed, "top1_decomposed": top1_decomposed, "top1": top1}


def main(settings: Settings) -> int:
    """Measure what is missing, one seed of all recipes after the other."""
    recipes = Recipes(settings)
    names = ("distillation_weight", "temperature", "refit_images")
    key = {**recipes.recovery.identity(), **{name: getattr(settings, name) for name in names}}
    results = ResultCells(settings.out, {**key, "plan": recipes.plan.to_dict(), "level": settings.plan.stem}, report)
    results.measure("dense", lambda: {"top1": recipes.recovery.top1(recipes.recovery.dense)})
    results.measure("start", lambda: {"top1": recipes.recovery.top1(recipes.start)})
    cells = [(recipe, seed) for seed in settings.seeds for recipe in settings.recipes]
    return results.measure_all({f"{name}, seed {seed}": partial(recipes.measure, name, seed) for name, seed in cells})


def report(results: ResultCells) -> str:
    """A row a recipe, the mean of its seeds, and the same seeds of the control."""
    cells, settings = results.cells, results.settings
    of_recipe = {
        name: {cell["seed"]: cell["top1"] for cell in cells.values() if cell.get("recipe") == name}
        for name in dict.fromkeys(cell["recipe"] for cell in cells.values() if "recipe" in cell)
    }

    def gain(name: str) -> str:
        shared = of_recipe[name].keys() & of_recipe.get(CONTROL, {}).keys()
        gains = [100 * (of_recipe[name][seed] - of_recipe[CONTROL][seed]) for seed in sorted(shared)]
        return f"{mean(gains):+.2f} ({', '.join(f'{each:+.2f}' for each in gains)})" if gains else "-"

    table = tabulate(
        f"{settings['architecture']}, {settings['level']}, {settings['steps']} steps of {settings['batch_size']} "
        f"images; {fine_tuning(settings)}; dense {percent(cells['dense']['top1'])} %, before fine-tuning "
        f"{percent(cells['start']['top1']) if 'start' in cells else '-'} %",
        [name for name, found in of_recipe.items() if found],
        {
            "Recipe": str,
            "Top-1 %": lambda name: percent(mean(of_recipe[name].values())),
            "Seeds": lambda name: str(len(of_recipe[name])),
            "Against the control, points (each seed)": gain,
        },
    )
    error = 100 * (0.16 / settings["test_images"]) ** 0.5
    note = (
        f"Top-1 on {settings['test_images']} test images after the last step. The standard error of one figure is "
        f"about {error:.1f} points at 80 %: a gain of one seed that is not well above it says nothing."
    )
    return page(table, note)


if __name__ == "__main__":
    run(Settings, main)
