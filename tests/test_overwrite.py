"""No tool replaces a file that is there, unless it is told to."""

import shlex
from pathlib import Path

import pytest

from norton_deploy.commands import run

TOOLS = Path(__file__).parents[1] / "tools"
WRITERS = {
    "check_data": "--data d --task box --sheet {}.jpg",
    "complexity": "--json {}",
    "compress": "--plan p.yaml --out {}.safetensors",
    "demo_video": "--out {}",
    "eval_det": "--task mask --data d --model m.onnx --results {}",
    "export_onnx": "--task box --out {}.onnx",
    "export_trt": "--task box --out {}.engine",
    "export_torch": "--task box --out {}.pt2",
    "gradcam": "--model m --compressed c --images i --out {}.png",
    "import_data": "--layout yolo --train {data} --val {data} --out {folder}",
    "import_detectron2": "--config c.yaml --weights w.pth --out {}.safetensors",
    "import_model": "--model m.pth --out {}.safetensors",
    "latency": "--models a.onnx b.onnx --data d --json {}",
    "make_crops": "--data {data} --out {folder}",
    "make_synthetic": "--train 1 --val 1 --out {folder}",
    "plan": "--model resnet18 --budget macs=0.5 --data d --out {}",
    "predict": "--model m.onnx --images {data} --out {folder}",
    "train_cls": "--data d --out o --steps 1 --json {}",
    "train_det": "--task box --data d --out o --steps 1 --json {}",
    "verify_engine": "--model m.engine --json {}",
}
CASES = [
    *WRITERS.items(),
    ("eval_det", "--task mask --data d --model m.onnx --results {folder}/detections.json --json {}"),
    ("eval_det", "--task mask --data d --model m.onnx --results {folder}/new.json"),  # its boxes: new.bbox.json
    ("export_trt", "--task box --out {folder}/other.engine"),  # its graph: other.onnx
    ("export_trt", "--task box --out {folder}/third.engine"),  # its manifest: third.engine.json
    ("export_torch", "--task box --out {folder}/other.pt2"),  # its graph: other.onnx
    ("plan", "--model resnet18 --budget macs=0.5 --data d --out {folder}/new.yaml"),  # its report: new.md
]


def test_every_tool_that_writes_is_here() -> None:
    go_on = {"compare", "demo", "deploy"}  # in their own folder, with the same settings only
    makes_no_file = {"serve"}
    assert {path.stem for path in TOOLS.glob("*.py")} - go_on - makes_no_file == set(WRITERS)


@pytest.mark.parametrize(("command", "arguments"), CASES)
def test_an_existing_file_stays(
    command: str, arguments: str, tmp_path: Path, tiny_coco: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("detections.json", "new.bbox.json", "other.onnx", "third.engine.json", "new.md"):
        (folder / name).write_text("mine")
    for suffix in ("", ".jpg", ".safetensors", ".onnx", ".engine", ".pt2", ".png"):
        (tmp_path / f"old{suffix}").write_text("mine")
    before = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    line = arguments.format(tmp_path / "old", data=tiny_coco, folder=folder)
    assert run(command, shlex.split(line)) == 1
    message = capsys.readouterr().err
    assert "is there already" in message or "holds something already" in message, message
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_overwrite_replaces(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    figures.write_text("mine")
    assert run("complexity", ["--arch", "resnet18", "--task", "cls", "--json", str(figures), "--overwrite"]) == 0
    assert '"macs"' in figures.read_text()
