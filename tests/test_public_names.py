"""The package's public names, and what importing it costs."""

import subprocess
import sys
from pathlib import Path

import pytest

import norton_deploy

TOOLS = Path(__file__).parents[1] / "tools"


def test_every_public_name_exists_and_is_documented() -> None:
    assert sorted(norton_deploy._HOME) == norton_deploy.__all__
    for name in norton_deploy.__all__:
        assert getattr(norton_deploy, name).__doc__, name
    with pytest.raises(AttributeError, match="nonsense"):
        norton_deploy.nonsense  # noqa: B018


def test_detections_need_no_torch() -> None:
    code = "import sys; from norton_deploy import Detections, Categories; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_command_has_a_tool_and_every_tool_a_command() -> None:
    commands = Path(norton_deploy.__file__).parent / "commands"
    assert {path.stem for path in TOOLS.glob("*.py")} == {path.stem for path in commands.glob("[a-z]*.py")}


@pytest.mark.parametrize("tool", sorted(path.stem for path in TOOLS.glob("*.py")))
def test_help_exits_with_zero_and_a_mistake_with_two(tool: str, capsys: pytest.CaptureFixture[str]) -> None:
    from norton_deploy.commands import run

    assert run(tool, ["--help"]) == 0
    assert tool.split("_")[0] in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run(tool, ["--no-such-option"])
    assert caught.value.code == 2


def test_a_user_error_is_one_line_and_status_one(capsys: pytest.CaptureFixture[str]) -> None:
    from norton_deploy.commands import run

    assert run("compress", ["--plan", "nowhere.yaml", "--out", "x.safetensors"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "error: nowhere.yaml: cannot read (No such file or directory)\n"
    assert "Traceback" not in captured.err
