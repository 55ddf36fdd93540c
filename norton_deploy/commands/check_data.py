"""Check a dataset in COCO's layout before anything is trained on it; the exit status is 1 if there are errors."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from norton_deploy.commands import Output, write_json
from norton_deploy.config import parse_settings
from norton_deploy.data.coco import CocoDetection
from norton_deploy.data.dataset_check import check_dataset
from norton_deploy.deployment.contact_sheet import draw_contact_sheet
from norton_deploy.files import check_output_file
from norton_deploy.structures import Task


@dataclass(frozen=True)
class Settings(Output):
    """Settings of tools/check_data.py."""

    data: Path
    """Folder in COCO-2017's layout: train2017/, val2017/, annotations/."""
    task: Task
    """box, mask or keypoint."""
    sheet: Path | None = None
    """Draw some images of train with their annotations on a contact sheet (.jpg)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = parse_settings(Settings, argv, prog="check_data", description=__doc__ or "")
    check_output_file(settings.sheet, "--sheet", ".jpg", overwrite=settings.overwrite)
    check_output_file(settings.json, "--json", overwrite=settings.overwrite)
    found = check_dataset(settings.data, settings.task)
    print("\n".join(found.lines()), file=sys.stderr)
    write_json(found.to_dict(), settings.json)
    if settings.sheet is not None:
        draw_contact_sheet(settings.sheet, CocoDetection(settings.data, "train", settings.task, skip_bad=True))
        print(f"{settings.sheet}: look whether the boxes lie where they should", file=sys.stderr)
    found.require()
    print(f"{settings.data}: no errors", file=sys.stderr)
    return 0
