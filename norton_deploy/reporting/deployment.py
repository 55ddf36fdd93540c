"""What a deployment came to: a small model beside the dense one that it was made from."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from norton_deploy.config import from_mapping
from norton_deploy.cost.turns import Speedup
from norton_deploy.errors import UserError
from norton_deploy.evaluation.coco_metrics import MeasureScore, primary_iou_type, table3_scores
from norton_deploy.reporting.latency import LatencySummary
from norton_deploy.structures import Task


@dataclass(frozen=True, kw_only=True)
class ModelRecord:
    """One of the models that are compared.

    Attributes:
        name: what the report calls it.
        file: what was measured, relative to the report's folder, or its name alone where it lies elsewhere.
        runs_on: engine and machine, in words.
        macs, params: of one image and of the whole model.
        file_bytes: of the file.
        scores: measure ("bbox", "segm", "keypoints") -> how well that very file detects; empty: not evaluated.
        latency: of that very file, end to end; None: not timed.
    """

    name: str
    file: str
    runs_on: str
    macs: float | None = None
    params: float | None = None
    file_bytes: int | None = None
    scores: dict[str, MeasureScore] = field(default_factory=dict)
    latency: LatencySummary | None = None

    def score(self, task: Task) -> MeasureScore | None:
        """The task's own measure, which Table III lists."""
        return self.scores.get(primary_iou_type(task))

    def table3(self, task: Task) -> tuple[float | None, float | None]:
        """Table III's AP and AR, 0..1; None where it was not evaluated or there was no object to find."""
        if primary_iou_type(task) not in self.scores:
            return None, None
        scores = table3_scores(task, {name: score.metrics for name, score in self.scores.items()})
        return tuple(value if value >= 0 else None for value in scores)  # type: ignore[return-value]


@dataclass(frozen=True)
class ComparedImage:
    """One image as both models see it and as it was annotated.

    Attributes:
        name: of the image file.
        objects: annotated ones, without crowds.
        dense_found, small_found: how many of them each model found.
        dense, small, annotated: drawn .jpg files, relative to the report's folder.
    """

    name: str
    objects: int
    dense_found: int
    small_found: int
    dense: str
    small: str
    annotated: str


@dataclass(frozen=True)
class StepRecord:
    """Attributes: what was done, the command that does it alone, how long it took (None: unknown)."""

    title: str
    command: str
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Everything that the report shows; what does not apply is left at its default and left out of the page.

    Attributes:
        title: of the page.
        task: of both models.
        dense, small: the two models. `small` is the artefact to ship, as a file for the target engine.
        provenance: of `provenance()`.
        others: further models of the table, such as the small one before its export or its fine-tuning.
        data, images: name of the dataset, and how many of its held-out images were evaluated.
        speedup: of `small` over `dense`, paired.
        artefact: the file or folder to ship, relative to the report's folder; "" when there is none.
        asked: times as fast that the small model was to be; None: nothing was asked.
        budget: that the plan was made for, such as "speedup=4"; "" without one.
        plan: of `FoundPlan.to_dict`.
        parity: of `ParityReport.to_dict`, the artefact against the model in eager mode.
        compared: pictures, the largest losses first.
        training: lines of the fine-tuning's log.jsonl, the run's `read_log`.
        steps: everything that was run, in order.
        notes: what a reader must know before believing a figure, such as what a quick run left out.
    """

    title: str
    task: Task
    dense: ModelRecord
    small: ModelRecord
    provenance: dict[str, Any]
    others: tuple[ModelRecord, ...] = ()
    data: str = ""
    images: int = 0
    speedup: Speedup | None = None
    artefact: str = ""
    asked: float | None = None
    budget: str = ""
    plan: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    compared: tuple[ComparedImage, ...] = ()
    training: tuple[dict[str, Any], ...] = ()
    steps: tuple[StepRecord, ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """All fields, and first what a script asks for: `ap_dense` and `ap_small`, Table III's AP or null."""
        scores = {f"ap_{name}": getattr(self, name).table3(self.task)[0] for name in ("dense", "small")}
        speedup = {"speedup": None if self.speedup is None else self.speedup.to_dict()}
        return json.dumps(scores | speedup | {"artefact": self.artefact} | asdict(self) | speedup, indent=1) + "\n"

    @classmethod
    def from_json(cls, path: Path) -> Deployment:
        """Read a report.json.

        Raises:
            UserError: the file is missing, or is none.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values = {name: value for name, value in values.items() if name not in ("ap_dense", "ap_small")}
            if values.get("speedup"):
                values["speedup"].pop("verdict", None)
        except OSError as error:
            raise UserError(f"{path}: cannot read ({error.strerror})") from error
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}: not a deployment's report.json") from error
        return from_mapping(cls, values, str(path))
