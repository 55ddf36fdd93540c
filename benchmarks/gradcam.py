"""Feature preservation: Grad-CAM of dense and compressed models side by side, and the correlation of their maps.

tools/gradcam.py for a classifier on images of its test set and for a detector on held-out scenes, the picture and the
figures of both in one place. The picture's columns and the table's rows are named after the models' folders.

    python benchmarks/gradcam.py --classifier runs/vgg16/last.safetensors --classifier-compressed FILE ... \
        --classifier-images runs/cifar/test --detector DENSE --detector-compressed FILE ... --detector-images FOLDER
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import RESULTS, Cell, ResultCells, page, run, tabulate
from norton_deploy.data.image_folder import read_images
from norton_deploy.reporting.gradcam import compare_gradcam, open_compared
from norton_deploy.reporting.gradcam_picture import draw_gradcam
from norton_deploy.reporting.report import Table

NOTES = """\
The correlation is Pearson's, between a compressed model's map and the dense model's on the same image for the same \
class (classifier) or the same box (detector), at three levels of the backbone, from early to late; mean and standard \
deviation over the images. A detector's box is one that all models found, which favours agreement: images without such \
a box are left out. Maps that are constant have no correlation and are left out.

![Grad-CAM of classifiers](gradcam_classifier.jpg)

![Grad-CAM of detectors](gradcam_detector.jpg)"""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/gradcam.py."""

    classifier: Path
    """Dense classifier."""
    classifier_compressed: tuple[Path, ...]
    """Its compressed forms."""
    classifier_images: Path
    """Folder of images."""
    detector: Path
    """Dense detector."""
    detector_compressed: tuple[Path, ...]
    """Its compressed forms."""
    detector_images: Path
    """Folder of images."""
    count: int = 100
    """Images over which correlations are averaged, of each kind."""
    out: Path = RESULTS / "gradcam.json"
    """Results file; table and pictures are written beside it."""


def main(settings: Settings) -> int:
    """Measure what is missing."""
    s = settings
    classifiers, detectors = (s.classifier, s.classifier_compressed), (s.detector, s.detector_compressed)
    return ResultCells(s.out, {"count": s.count}, report).measure_all(
        {
            "classifier": partial(explain, s, "classifier", *classifiers, s.classifier_images),
            "detector": partial(explain, s, "detector", *detectors, s.detector_images),
        }
    )


def explain(s: Settings, kind: str, dense: Path, compressed: tuple[Path, ...], images: Path) -> dict[str, Any]:
    """The picture of one kind of model, and its figures."""
    found = compare_gradcam(open_compared(dense, compressed), read_images(images, s.count))
    draw_gradcam(s.out.with_name(f"{s.out.stem}_{kind}.jpg"), found)
    counts = {"images": found.images, "images_without_a_shared_detection": found.skipped}
    return {"model": str(dense), **counts, "correlation": found.correlation}


def report(results: ResultCells) -> str:
    """A table a kind of model."""
    return page(*(correlations(kind, cell) for kind, cell in results.cells.items()), NOTES)


def correlations(kind: str, cell: Cell) -> Table:
    """One row a compressed model."""
    rows = cell["correlation"].items()
    levels = {
        level: lambda row, level=level: "{mean} ± {std}".format(**row[1][level])
        for level in next(iter(cell["correlation"].values()))
    }
    caption = f"Correlation with the dense {kind}'s maps, {cell['images']} images"
    return tabulate(caption, rows, {kind.capitalize(): lambda row: row[0], **levels})


if __name__ == "__main__":
    run(Settings, main)
