"""Feature preservation: Grad-CAM of dense and compressed models side by side, and the correlation of their maps.

tools/gradcam.py for a classifier on images of its test set and for a detector on held-out scenes, the picture and the
figures of both in one place. The picture's columns and the table's rows are named after the models' folders.

    python benchmarks/gradcam.py --classifier runs/vgg16/last.safetensors --classifier-compressed FILE ... \
        --classifier-images runs/cifar/test --detector DENSE --detector-compressed FILE ... --detector-images FOLDER
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy import commands
from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError
from norton_deploy.files import atomic_write
from norton_deploy.reporting.tables import Table

RESULTS = Path(__file__).parent / "results"
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


def main() -> int:
    """Run the benchmark."""
    s = parse_settings(Settings, prog="gradcam", description=__doc__ or "")
    result = {
        "classifier": explain(s, "classifier", s.classifier, s.classifier_compressed, s.classifier_images),
        "detector": explain(s, "detector", s.detector, s.detector_compressed, s.detector_images),
    }
    commands.write_json(result, s.out)
    with atomic_write(s.out.with_suffix(".md"), "w") as stream:
        stream.write("\n\n".join([*(table(kind, found).to_markdown() for kind, found in result.items()), NOTES]) + "\n")
    return 0


def explain(s: Settings, kind: str, dense: Path, compressed: tuple[Path, ...], images: Path) -> dict[str, Any]:
    """The picture of one kind of model, and its figures."""
    picture = s.out.with_name(f"{s.out.stem}_{kind}.jpg")
    figures = s.out.with_name(f"{s.out.stem}_{kind}.json")
    argv = ["--model", str(dense), "--compressed", *map(str, compressed), "--images", str(images)]
    argv += ["--count", str(s.count), "--out", str(picture), "--json", str(figures)]
    if commands.run("gradcam", argv):
        raise UserError(f"{dense}: tools/gradcam.py failed")
    found: dict[str, Any] = json.loads(figures.read_text())
    figures.unlink()
    return found


def table(kind: str, found: dict[str, Any]) -> Table:
    """One row a compressed model."""
    levels = list(next(iter(found["correlation"].values())))
    rows = tuple(
        (name, *(f"{by_level[level]['mean']} ± {by_level[level]['std']}" for level in levels))
        for name, by_level in found["correlation"].items()
    )
    return Table(
        (kind.capitalize(), *levels), rows, f"Correlation with the dense {kind}'s maps, {found['images']} images"
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
