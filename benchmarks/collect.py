"""Writes docs/results.md from the result files: every table with the command, date and machine that made it.

Run it after a benchmark. A benchmark without results is left out; nothing is typed by hand.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.lib.cells import RESULTS, run
from norton_deploy.config import read_yaml
from norton_deploy.files import atomic_write
from norton_deploy.reporting.deployment import Deployment
from norton_deploy.reporting.deployment_report import models_table

ROOT = Path(__file__).resolve().parent.parent
INTRODUCTION = """\
# Results

Made by `benchmarks/collect.py` from the files in [benchmarks/results](../benchmarks/results); each section names the
command that made it; its folders below runs/ are to be replaced by one's own data and models. The machine had two CPU
cores and no GPU, but for the two sections about a GPU, which name theirs. No engine of TensorRT was run, and nothing
here was trained or evaluated on COCO-2017 or ImageNet. Rows marked as the paper's are quoted, not measured.
"""
SECTIONS = {
    "demo": "The demo: dense and compressed detector on drawn images",
    "table3": "Table III: latency",
    "gpu": "On a GPU",
    "table3_accuracy": "Table III: accuracy on the embedded data",
    "table3_accuracy_long": "Table III: accuracy after longer fine-tuning",
    "table3_mixed": "Table III: accuracy of a plan that mixes forms",
    "table3_full_width": "Table III: accuracy at torchvision's widths",
    "packaged": "Detectors in the package",
    "memorise_real": "Real photographs learnt by heart",
    "memorise_real_mixed": "Real photographs learnt by heart: a plan of mixed forms",
    "whole_detector": "Plans over the whole detector",
    "whole_detector_mixed": "A plan that mixes forms over the whole detector",
    "against": "Graphs of an older commit beside today's",
    "plan": "A plan for a speed-up of three in OpenVINO",
    "plan_int8": "A plan made for 8 bits",
    "plan_packaged": "The plan of the packaged mask detector",
    "pareto": "What speed costs: plans by form",
    "pareto_coupled": "What speed costs: coupled filters",
    "pareto_keypoint": "What speed costs a keypoint detector",
    "pareto_precision": "What speed costs in each precision",
    "make_plans": "Plans that mix forms, for torchvision's widths",
    "int8": "8 bits, bf16 and a second CPU engine",
    "int8_packaged": "8 bits of the packaged detectors",
    "quantisers": "Libraries that quantise",
    "channel_multiple": "Channels in multiples",
    "recovery": "Quick recovery without labels",
    "recovery_rank1": "All 3x3 convolutions at the MACs of rank 1, without labels",
    "recovery_shared": "Shared factors without labels",
    "shared_factors": "The family of factors on one classifier",
    "refit_size": "Smaller images in the refit",
    "operator_profile": "Where a compressed detector's time goes",
    "operator_forms": "RoIAlign, TopK and suppression in other forms",
    "table4_rank": "Table IV: rank",
    "table1_cifar": "Table I: VGG-16 on CIFAR-10",
    "table1_cifar_long": "Table I: longer fine-tuning",
    "distillation": "What a compressed detector should imitate",
    "recipes": "What parts of a fine-tuning recipe are worth",
    "loading": "Loading small images",
    "cifar_gpu": "CIFAR-10 on a GPU",
    "rivals": "Figure 1: other decompositions and filter choices",
    "keypoint_decoding": "Keypoint decoding in graphs",
    "export_parity": "Exported graphs against eager mode",
    "export_matrix": "Does the parity gate refuse sound exports?",
    "engine_builds": "TensorRT-RTX engines, built and not run",
    "size_buckets": "Fixed image sizes",
    "compression_time": "Time to compress a layer",
    "drawing": "Drawing and writing a frame",
    "fuzz": "Ten thousand damaged and malicious inputs",
    "faults": "Training runs killed at random moments",
    "soak": "Memory over thousands of predictions and an hour of video",
    "training_forms": "Forms of layers in training on a CPU",
    "gradcam": "Feature preservation: Grad-CAM",
}
"""Result file -> heading, in the order of the document."""
NOTES: dict[str, str] = read_yaml(ROOT / "benchmarks" / "notes.yaml")
"""Result file -> what a reader must know of it that it does not say."""
MACHINE_TABLE = re.compile(r"(?:## )?Machine and versions\n\n(?:Machine and versions\n\n)?(?:\|.*\n)+\n*")
"""The table of versions that some results end with: `origin` says the same."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/collect.py."""

    out: Path = ROOT / "docs" / "results.md"
    """Document to write."""


def main(settings: Settings) -> None:
    """Write the document."""
    with atomic_write(settings.out, "w") as stream:
        stream.write(document())


def document() -> str:
    """The whole text of docs/results.md."""
    sections = [
        section(name, heading)
        for name, heading in SECTIONS.items()
        if (RESULTS / f"{name}.md").is_file() or name == "demo"
    ]
    return "\n".join([INTRODUCTION, *sections])


def section(name: str, heading: str) -> str:
    """Heading, where the figures come from, tables and pictures of one result file."""
    results = json.loads((RESULTS / f"{name}.json").read_text())
    written = RESULTS / f"{name}.md"
    body = demo_table(RESULTS / "demo.json") if name == "demo" else written.read_text()
    note = f"\n\n{NOTES[name]}" if name in NOTES else ""
    return f"## {heading}\n\n{origin(name, results)}{note}\n\n{fit(body)}\n"


def origin(name: str, results: dict[str, Any]) -> str:
    """One paragraph: file, commands, dates, processor, versions."""
    records = list(provenances(results))
    commands = sorted({f"`{record['command']}`" for record in records})
    dates = sorted({record["date"][:10] for record in records})
    machines = sorted({machine(record["machine"]) for record in records})
    versions = records[0]["versions"]
    named = (package for package in ("torch", "torchvision", "onnxruntime-gpu") if package in versions)
    packages = ", ".join(f"{package} {versions[package]}" for package in named)
    period = " to ".join(dict.fromkeys((dates[0], dates[-1])))
    where = f"[{name}.json](../benchmarks/results/{name}.json)"
    return f"{where}: {', '.join(commands)}; {period}; {'; '.join(machines)}; {packages}."


def machine(record: dict[str, Any]) -> str:
    """GPU if there was one, processor, cores and threads."""
    gpu = f"{record['gpu']}, " if record.get("gpu") else ""
    return f"{gpu}{record['cpu']}, {record['cores']} cores, {record['torch_threads']} threads"


def provenances(value: Any) -> Any:
    """Every record of `provenance()` in a result file."""
    if isinstance(value, dict):
        if "versions" in value and "machine" in value:
            yield value
        else:
            for entry in value.values():
                yield from provenances(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from provenances(entry)


def fit(body: str) -> str:
    """A result's own Markdown, made to fit: headings a level down, its title gone, links from docs/."""
    body = MACHINE_TABLE.sub("", body.strip() + "\n\n")
    lines = [line for line in body.splitlines() if not line.startswith("# ")]
    lines = [f"#{line}" if line.startswith("#") else line for line in lines]
    return re.sub(r"\]\((?!http)([^)/]+)\)", r"](../benchmarks/results/\1)", "\n".join(lines).strip())


def demo_table(path: Path) -> str:
    """The demo's two rows in the form of Table III, and the paired verdict."""
    demo = Deployment.from_json(path)
    assert demo.speedup is not None
    return f"{models_table(demo).to_markdown()}\n\nNORTON against dense: {demo.speedup.verdict}."


if __name__ == "__main__":
    run(Settings, main)
