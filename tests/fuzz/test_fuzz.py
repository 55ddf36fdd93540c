"""Every input works with a correct result or is refused in one line that names the file; `make fuzz` runs more."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzz.corpus import CORPUS
from tests.fuzz.inputs import MAKERS, inputs
from tests.fuzz.readers import try_input

QUICK = {
    **{"coco": 15, "picture": 40, "plan": 40, "config": 40, "pickle": 60, "manifest": 40, "names": 40, "settings": 30},
    **{"yolo": 60, "yolo_names": 30, "voc": 60, "references": 40},
}
LONG = {"coco": 150, "checkpoint": 40, "state_dict": 60, "graph": 150}


def run(kind: str, folder: Path, cases: int) -> None:
    @settings(
        max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(inputs(kind))
    def every_input(content: bytes) -> None:
        try_input(kind, content, folder)

    every_input()


@pytest.mark.parametrize("kind", QUICK)
def test_some_inputs(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, QUICK[kind])


@pytest.mark.slow
@pytest.mark.parametrize("kind", MAKERS)
def test_more_inputs(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path, LONG.get(kind, 300))


@pytest.mark.parametrize("name", CORPUS)
def test_what_once_broke_is_refused(name: str, tmp_path: Path) -> None:
    kind, content = CORPUS[name]
    assert not try_input(kind, content() if callable(content) else content, tmp_path)
