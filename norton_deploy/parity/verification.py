"""Reference detections that travel beside a graph or an engine, and the comparison with them where it will run.

The gate compares the graph where it is exported. An engine is built from it, perhaps without a GPU, and first runs
somewhere else: there it is compared with what eager mode found in the same images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from norton_deploy.errors import UserError, shown
from norton_deploy.export.contract import TASK_OUTPUT, GraphContract, Precision
from norton_deploy.export.letterbox import Letterbox
from norton_deploy.files import atomic_write, sha256_of
from norton_deploy.inference.predictor import Predictor
from norton_deploy.inference.static_graph import StaticGraphPredictor, to_graph_input
from norton_deploy.parity.eager_stages import EagerStages
from norton_deploy.parity.references import Example, Reference, compare_detections
from norton_deploy.parity.report import TOLERANCES, ParityReport
from norton_deploy.parity.stages import decode_all, to_canvas
from norton_deploy.structures import Detections

MOST_IMAGES = 4
MOST_SAMPLES = 40
"""Detections with masks or heatmaps in a file, over all its images."""


@dataclass(frozen=True)
class ReferenceFile:
    """What an exported detector must find.

    Attributes:
        precision: that was asked for; its limits hold.
        labels: all that the model can give.
        cuts: score threshold and number of detections where the model's list ends.
        examples: images and what is in them.
    """

    contract: GraphContract
    precision: Precision
    labels: tuple[int, ...]
    cuts: dict[str, Any]
    examples: tuple[Example, ...]

    @classmethod
    def of(
        cls, contract: GraphContract, precision: Precision, model: GeneralizedRCNN, examples: Sequence[Example]
    ) -> ReferenceFile:
        """What `check_parity` kept of a model, for the graph with a contract: the images in which most is found."""
        eager = EagerStages(model, contract.image_size, contract.max_detections)
        most = sorted(examples, key=lambda example: -len(example.reference.detections))[:MOST_IMAGES]
        return cls(contract, precision, eager.labels, eager.cuts, tuple(most))

    def save(self, path: str | Path) -> None:
        """Write a compressed .npz, whole or not at all."""
        about = {
            "contract": self.contract.to_json(),
            "precision": self.precision,
            "labels": self.labels,
            "cuts": self.cuts,
            "by_probability": any(example.reference.by_probability for example in self.examples),
        }
        arrays: dict[str, npt.NDArray[Any]] = {"about": np.array(json.dumps(about))}
        most = MOST_SAMPLES // max(len(self.examples), 1)
        for index, example in enumerate(self.examples):
            reference, found = example.reference, example.reference.detections
            arrays |= {f"{index}.frame": example.frame, f"{index}.sample": reference.sample[:most]}
            arrays |= {f"{index}.{name}": getattr(found, name) for name in ("boxes", "scores", "labels")}
            for name in ("masks", "undecided"):
                if (pixels := getattr(reference, name)) is not None:
                    arrays[f"{index}.{name}"] = np.packbits(pixels[:most], axis=2)
            if reference.heatmaps is not None:
                arrays[f"{index}.heatmaps"] = reference.heatmaps[:most]
        with atomic_write(path) as stream:
            np.savez_compressed(stream, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceFile:
        """Inverse of `save`.

        Raises:
            UserError: no such file, or not one of these.
        """
        if not Path(path).is_file():
            raise UserError(f"{path}: no reference detections; export writes them beside the graph, take them along")
        try:
            with np.load(path, allow_pickle=False) as stored:
                about = json.loads(str(stored["about"]))
                contract = GraphContract.from_json(about["contract"], str(path))
                examples: list[Example] = []
                while f"{len(examples)}.frame" in stored:
                    examples.append(_example(stored, len(examples), contract, about["by_probability"]))
                limits = about["precision"]
                if limits not in TOLERANCES:
                    raise UserError(f"{path}: of precision {shown(limits)}; this version knows {', '.join(TOLERANCES)}")
                cuts = {"score_threshold": float, "max_detections": int}
                return cls(
                    contract,
                    limits,
                    tuple(map(int, about["labels"])),
                    {name: kind(about["cuts"][name]) for name, kind in cuts.items()},
                    tuple(examples),
                )
        except UserError:
            raise
        except Exception as error:  # zipfile, zlib and NumPy have no common base class for what they raise
            raise UserError(f"{path}: not a file of reference detections ({error}); export the model again") from error


def _example(stored: Any, index: int, contract: GraphContract, by_probability: bool) -> Example:
    part = {name: stored[f"{index}.{name}"] for name in ("boxes", "scores", "labels")}
    masks, undecided = (
        np.unpackbits(stored[name], axis=2, count=contract.image_size[1]).astype(bool) if name in stored else None
        for name in (f"{index}.masks", f"{index}.undecided")
    )
    heatmaps = stored.get(f"{index}.heatmaps")
    found = Detections(part["boxes"], part["scores"], part["labels"], contract.image_size)
    frame, sample = stored[f"{index}.frame"], stored[f"{index}.sample"]
    if frame.dtype != np.uint8 or frame.shape != (*contract.input_size, 3):
        raise ValueError(f"{index}.frame is no image of the graph's size")
    if sample.dtype.kind != "i" or not np.isin(sample, np.arange(len(found))).all():
        raise ValueError(f"{index}.sample is none of its detections")
    reference = Reference(found, sample, masks, undecided, heatmaps, by_probability)
    return Example(frame, reference)


def reference_path(model_path: str | Path) -> Path:
    """The references of `model.onnx` and `model.engine` are `model.reference.npz`."""
    return Path(model_path).with_suffix(".reference.npz")


def verify(predictor: Predictor, references: ReferenceFile) -> ParityReport:
    """Run a graph or engine, where it is, on the references' images and compare; `require()` the report.

    Raises:
        UserError: no exported graph, or the references are another graph's.
    """
    if not isinstance(predictor, StaticGraphPredictor):
        raise UserError(f"{predictor.name}: only exported graphs and engines have reference detections")
    contract = predictor.contract
    if contract != references.contract:
        raise UserError(f"{predictor.name}: its reference detections are those of another graph; export it again")
    report = ParityReport(predictor.name, references.precision)
    for start in range(0, len(references.examples), contract.batch):
        batch = references.examples[start : start + contract.batch]
        frames = np.stack(list(islice(cycle([example.frame for example in batch]), contract.batch)))
        outputs = predictor.run(to_graph_input(frames, contract.input_dtype))
        if contract.resize == "graph":
            outputs = to_canvas(outputs, Letterbox.fit(contract.input_size, contract.image_size))
        found = decode_all(outputs, contract.image_size, references.labels, contract.mask_paste)[: len(batch)]
        expected = [example.reference for example in batch]
        compare_detections(report, "final", expected, found, TOLERANCES[references.precision], **references.cuts)
        report.images += len(batch)
        report.detections += sum(map(len, found))
    report.require_enough("boxes", *TASK_OUTPUT[contract.task])
    return report


def verify_once(predictor: Predictor) -> None:
    """Compare a model file with the references beside it at its first load on a device; for `load_predictor`'s `check`.

    That it passed is noted in `NAME.verified.json`, with the file's SHA-256; where that cannot be written it is
    compared again next time.

    Raises:
        UserError: it differs, or there are no references.
    """
    note = Path(f"{predictor.name}.verified.json")
    passed = {"sha256": sha256_of(predictor.name), "device": predictor.device}
    try:
        if json.loads(note.read_text()) == passed:
            return
    except (OSError, ValueError):
        pass
    verify(predictor, ReferenceFile.load(reference_path(predictor.name))).require()
    try:
        with atomic_write(note, "w") as stream:
            stream.write(json.dumps(passed) + "\n")
    except UserError:  # a read-only folder
        return
