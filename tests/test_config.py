"""Settings from YAML and the command line."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from norton_deploy.config import parse_settings
from norton_deploy.errors import UserError


@dataclass(frozen=True)
class Inner:
    width: int = 3


@dataclass(frozen=True)
class Settings:
    task: str
    image_size: tuple[int, int] = (800, 600)
    inner: Inner = field(default_factory=Inner)


def parse(*argv: str) -> Settings:
    return parse_settings(Settings, argv, prog="test", description="")


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_file_over_default(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "task: mask\nimage-size: [320, 240]\ninner: {width: 7}\n")
    assert parse("--config", config) == Settings("mask", (320, 240), Inner(7))
    assert parse("--task", "box", f"--config={config}", "--inner.width", "9") == Settings("box", (320, 240), Inner(9))
    assert parse("--task", "box") == Settings("box")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: box\nimag_size: [1, 2]", "unknown key 'imag_size'"),
        ("task: box\ninner: {depth: 1}", "inner: unknown key 'depth'"),
        ("task: box\nimage_size: [a, 2]", "field 'image_size.0'"),
        ("- 1", "expected a mapping"),
        ("task: [", "not valid YAML"),
        ("task: box\ninner: {width: 1, 'width': 2}", "'width' stands there twice in line 2, column 19"),
    ],
)
def test_mistakes_in_a_file_are_named(tmp_path: Path, text: str, message: str) -> None:
    config = write(tmp_path / "c.yaml", text)
    with pytest.raises(UserError, match=r"c\.yaml.*") as caught:
        parse("--config", config)
    assert message in str(caught.value)


def test_a_required_setting_missing_everywhere_stops(tmp_path: Path) -> None:
    config = write(tmp_path / "c.yaml", "image_size: [1, 2]")
    with pytest.raises(SystemExit) as caught:
        parse("--config", config)
    assert caught.value.code == 2


def test_missing_file() -> None:
    with pytest.raises(UserError, match=r"nowhere\.yaml"):
        parse("--config", "nowhere.yaml")


@dataclass(frozen=True)
class Either:
    steps: int | None = None
    epochs: int | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give one of the two")


def test_checks_wait_for_the_command_line(tmp_path: Path) -> None:
    def parse_either(text: str, *argv: str) -> Either:
        config = write(tmp_path / "c.yaml", text)
        return parse_settings(Either, ("--config", config, *argv), prog="test", description="")

    assert parse_either("{}", "--epochs", "3") == Either(epochs=3)
    assert parse_either("steps: 5", "--steps", "None", "--epochs", "3") == Either(epochs=3)
    with pytest.raises(UserError, match="give one"):
        parse_either("steps: 5", "--epochs", "3")
