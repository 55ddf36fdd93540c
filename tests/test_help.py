"""`--help` is read from the source: it names what is parsed, and imports next to nothing."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from norton_deploy.option_help import help_text, options_of

COMMANDS = sorted(path.stem for path in (Path(__file__).parents[1] / "tools").glob("*.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_the_options_that_are_parsed(command: str) -> None:
    settings = import_module(f"norton_deploy.commands.{command}").Settings
    parsed = {
        option.removeprefix("--"): action
        for action in tyro.extras.get_parser(settings)._actions
        for option in action.option_strings
        if option.startswith("--") and not option.rpartition(".")[2].removeprefix("--").startswith("no-")
    }
    parsed.pop("help", None)
    options = {option.name: option for option in options_of(command)}
    assert set(options) == set(parsed)
    assert {name for name, option in options.items() if option.default is None} == {
        name for name, action in parsed.items() if action.required
    }
    assert all(option.text for option in options.values())
    text = help_text(command)
    assert all(text.count(f"  --{name} ") == 1 for name in options), "every option stands in one group"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_torch(command: str) -> None:
    code = (
        "import sys; from norton_deploy.commands import run\n"
        f"try: run({command!r}, ['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(bool({'torch', 'cv2', 'numpy', 'onnxruntime', 'tyro'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


@pytest.mark.parametrize("call", [[], ["deploy", "--help"], ["train_det", "--help"]])
def test_a_reader_that_has_enough_hears_no_complaint(call: list[str]) -> None:
    code = f"import sys; sys.argv = ['norton', *{call!r}]; from norton_deploy.commands import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == "" and process.returncode == 141


def test_what_matters_most_comes_first() -> None:
    text = help_text("train_det")
    needed, rest = text.partition("\nMost used:")[::2]
    assert all(f"  --{name} " in needed for name in ("task", "data", "out"))
    assert "--task {box,mask,keypoint}" in needed
    first = [line.split()[0] for line in rest.splitlines() if line.startswith("  --")][:3]
    assert first == ["--epochs", "--steps", "--init"]
    assert "The detector; its number of classes is that of the data (--detector.*):" in text
    assert "--detector.image.min-size INT\n      Images are resized so that their short side" in text
    assert "(default: 800)" in text


def test_a_suppressed_option_is_not_offered() -> None:
    assert "  --target " not in help_text("export_trt")
    assert "  --target " in help_text("export_onnx")
