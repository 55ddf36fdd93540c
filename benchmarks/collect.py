"""Writes docs/results.md from the result files: every table with the command, date and machine that made it.

Run it after a benchmark. A benchmark without results is left out; nothing is typed by hand.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norton_deploy.config import parse_settings
from norton_deploy.files import atomic_write
from norton_deploy.reporting.tables import DetectorRow, detector_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
INTRODUCTION = """\
# Results

Made by `benchmarks/collect.py` from the files in [benchmarks/results](../benchmarks/results); each section names the
command that made it; its folders below runs/ are to be replaced by one's own data and models. The machine had two CPU
cores and no GPU: no engine of TensorRT was run, and nothing here was trained or evaluated on COCO-2017 or ImageNet.
Rows marked as the paper's are quoted, not measured.
"""
SECTIONS = {
    "demo": "The demo: dense and compressed detector on drawn images",
    "table3": "Table III: latency",
    "table3_accuracy": "Table III: accuracy on the embedded data",
    "packaged": "Detectors in the package",
    "memorise_real": "Real photographs learnt by heart",
    "whole_detector": "Plans over the whole detector",
    "plan": "A plan for a speed-up of four",
    "channel_multiple": "Channels in multiples",
    "recovery": "Quick recovery without labels",
    "operator_profile": "Where a compressed detector's time goes",
    "table4_rank": "Table IV: rank",
    "table1_cifar": "Table I: VGG-16 on CIFAR-10",
    "rivals": "Figure 1: other decompositions and filter choices",
    "keypoint_decoding": "Keypoint decoding in graphs",
    "export_parity": "Exported graphs against eager mode",
    "engine_builds": "TensorRT-RTX engines, built and not run",
    "size_buckets": "Fixed image sizes",
    "compression_time": "Time to compress a layer",
    "training_forms": "CPDBlocks in training",
    "gradcam": "Feature preservation: Grad-CAM",
}
"""Result file -> heading, in the order of the document."""
NOTES = {
    "plan": "The model is `benchmarks/random_detector.py`'s: seeded random weights, on which no low rank beats "
    "pruning, so the plan prunes only. Time, MACs and parameters are those of any weights; harm is not.",
    "operator_profile": "The compressed detectors' matrix products reach less of the machine's rate than the dense "
    "ones', and they are no longer nearly all of the time: RoIAlign's gathers and element-wise work do not shrink "
    "with the MACs.",
    "recovery": "One detector (the demo's dense one, 450 steps) and one seed. Seconds were measured on a busy "
    "machine. MACs are counted with 1000 proposals; the detector uses 200.",
    "engine_builds": "Measured on one thread of a busy machine, so upper bounds, but for dense and table3 keypoint "
    "detectors in fp32: these were measured again on two quiet cores. Weights are random; a random head's masks lie "
    "so near their threshold that one fp16 comparison fails on it.",
    "table3_accuracy": "One seed so far. Goals for the dense detector (box AP 0.45, AP50 0.75) are reached by Mask "
    "R-CNN and missed by Faster R-CNN by 0.008 and 0.009. The goals for compressed ones were to keep 0.97 with the "
    "Table III plan, which distillation reaches for boxes (1.01) and masks (0.98) and misses by 0.04 for keypoints "
    "(0.93), and 0.93 with `fast`, which is missed by 0.02 for boxes (0.91), by 0.16 for masks and by 0.74 for "
    "keypoints. The losses come from the heads: the Table III plan leaves them alone, `balanced` decomposes them and "
    "halves the keypoint head, `fast` prunes all of them. Equal shares of these narrow detectors are harsh on heads: "
    "`fast` leaves 28 channels in the pyramid, 24 in the mask head and 16 in the keypoint head, where torchvision's "
    "widths leave 112, 96 and 128. What was tried for `fast` and masks: three times the learning rate helps (the "
    "dense detector does not gain from it); distillation is worth at most 0.009 AP, and with weight 6 (tried at the "
    "lower rate only) it harms. For boxes distillation is worth 0.013 to 0.019 with every plan; for keypoints it helps "
    "the Table III plan and no other. Keypoint heads learn slowly: the dense one took 3000 steps to an AP of 0.17, and "
    "600 are too few after a compression of the head. Rows at a rate of 0.0005 come from the same commands with "
    "`--finetune-lr 0.0005`.",
    "table4_rank": "The goal for the dense model was 91 %. Ten epochs were too few for it (learning rate 0.1, one "
    "cosine), so all accuracies lie lower than the paper's, and the decomposition's errors higher: weights that were "
    "trained briefly may have less structure. All fine-tunings have the same 100 steps, a quarter of an epoch.",
    "table1_cifar": "The goal was to lose less than the paper at each level; it is missed at all of them. Training "
    "loss is still high where few parameters are left: one and a half epochs are short. All were fine-tuned at 0.02 "
    "only. That suits the dense model badly, which loses 0.8 points by it, and other decompositions of the same "
    "network bear a tenth of it better (see below); a lower rate was not tried here. "
    "The dense model was trained in three runs of configs/train/cifar10_vgg16.yaml, each from the last one's weights: "
    "10 epochs with a peak learning rate of 0.1, 3 of 9 at 0.05, 12 at 0.04. The goal was 91 %.",
    "rivals": "The first table was measured at the MACs of rank 1 only; 100 steps are a quarter of an epoch. At these "
    "MACs every rival, which shares factors between filters, loses far less on this network than the filters' own "
    "CPD. The refit, which this comparison leaves out for all, brings the filters' CPD to 77.6 % without labels and "
    "82.0 % after 600 steps at 0.02 (Table I). PABS is the last of four choices when filters are decomposed first, "
    "by more than the spread of three seeds except against FPGM, and L1 norm the first; so the paper's choice is not "
    "confirmed here. Its order is, beyond the spread for all choices but the random one: decomposing first keeps 2 to "
    "6 points more. A seed changes the order of the images, the start of the decomposition and the random choice, not "
    "the dense network. Nor is the order of the steps the only difference between the halves of the table: "
    "decomposing first leaves factors of unlike norms, which a fixed learning rate treats otherwise.",
    "training_forms": "Measured on one core while the other one trained a detector.",
    "gradcam": "The classifiers are Table IV's, the detectors those of Table III's accuracy.",
    "demo": "Measured before checkpoints ran in their grouped form in torch, which makes NORTON faster than here.",
    "whole_detector": "The score threshold is 0 and weights are random, so that eager mode runs NMS over some 90,000 "
    "boxes of an image, which a trained detector does not: part of every ratio to torch eager is this (see "
    "postprocess among the stages of Table III's latency). Ratios to ONNX Runtime do not have it. Compressed models "
    "in torch eager run here as they are trained; loaded checkpoints run a quicker form.",
    "packaged": "The mask detector is Table III's best `fast` one. The keypoint detector was fine-tuned for five times "
    "as long (`benchmarks/table3_accuracy.py --tasks keypoint --plans fast --detector-steps 3000 --finetune-steps "
    "3000`, the run without a teacher): after Table III's 600 steps its OKS AP is 0.033. It finds people, heads and "
    "trunks; limbs are often wrong.",
    "memorise_real": "Both detectors reach the goal for boxes, for masks only the dense one does: the compressed "
    "one's mask AP50 is 0.21 short of it after 1200 steps. All objects but the largest are pooled from coarse levels "
    "(canonical scale 53), which suits the boxes of small images better than their masks.",
}
"""What a reader must know of a result that its file does not say."""
MACHINE_TABLE = re.compile(r"(?:## )?Machine and versions\n\n(?:Machine and versions\n\n)?(?:\|.*\n)+\n*")
"""The table of versions that some results end with: `origin` says the same."""


@dataclass(frozen=True)
class Settings:
    """Settings of benchmarks/collect.py."""

    out: Path = ROOT / "docs" / "results.md"
    """Document to write."""


def main() -> int:
    """Write the document."""
    settings = parse_settings(Settings, prog="collect", description=__doc__ or "")
    with atomic_write(settings.out, "w") as stream:
        stream.write(document())
    return 0


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
    body = demo_table(results) if name == "demo" else written.read_text()
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
    """Processor, cores and threads."""
    return f"{record['cpu']}, {record['cores']} cores, {record['torch_threads']} threads"


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


def demo_table(results: dict[str, Any]) -> str:
    """The demo's two rows in the form of Table III, and the paired verdict."""
    dense = results["complexity"]["dense"]
    rows = []
    for name, metrics in results["metrics"].items():
        own = results["complexity"][name]
        rows.append(
            DetectorRow(
                model=name,
                runs_on="torch eager",
                macs=own["macs"],
                params=own["params"],
                dense_macs=dense["macs"],
                dense_params=dense["params"],
                fps=results["latency"][name]["fps"],
                latency_ms=results["latency"][name]["p50_ms"],
                ap=metrics["bbox"]["AP"],
                ar=metrics["bbox"]["AR100"],
            )
        )
    table = detector_table(rows, f"{results['held_out_images']} held-out drawn images", paper=results["task"])
    return f"{table.to_markdown()}\n\nNORTON against dense: {results['speedup']['verdict']}."


if __name__ == "__main__":
    sys.exit(main())
