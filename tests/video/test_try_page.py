"""The page to try models on, in a browser: a picture, the slider, a clip, and files that are none."""

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from norton_deploy.commands import run
from norton_deploy.inference.predictor import Image, Predictor, StageTiming
from norton_deploy.structures import Categories, Detections
from norton_deploy.video.sinks import VideoFile
from norton_deploy.video.try_page import LONG_SIDE, Tried, look, serve, try_page

PICTURE = "#picture input[type=file]"


class TwoThings(Predictor):
    """Finds two things of fixed scores in every image, in a fixed time."""

    name, backend, task, device, input_size = "two things", "torch", "box", "cpu", None
    categories = Categories((1,), (1,), ("thing",))

    def __init__(self, scores: tuple[float, float], time_ms: float) -> None:
        self.scores, self.time_ms = np.array(scores, np.float32), time_ms

    def _detect(self, images: Sequence[Image]) -> list[Detections]:
        self.timing = StageTiming(infer_ms=self.time_ms)
        boxes = np.array([[2, 2, 20, 20], [30, 30, 60, 60]], np.float32)
        return [Detections(boxes, self.scores, np.ones(2, np.int64), image.shape[:2]) for image in images]


MODELS = (Tried("Baseline: a", TwoThings((0.9, 0.4), 50.0)), Tried("Model: b", TwoThings((0.8, 0.01), 10.0)))


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the page, served to this machine."""
    pytest.importorskip("gradio", reason="gradio is not installed (the extra 'serve')")
    page = try_page(MODELS, tmp_path_factory.mktemp("uploads"))
    yield serve(page, "127.0.0.1", None, wait=False)
    page.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, which may ask nobody else for anything."""
    assert address.startswith("http://127.0.0.1:")
    opened = browser.new_page(viewport={"width": 1100, "height": 900})
    elsewhere: list[str] = []
    opened.on("request", lambda request: elsewhere.append(request.url))
    opened.goto(address)
    opened.wait_for_selector(PICTURE, state="attached")
    yield opened
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
    opened.close()


@pytest.fixture
def wait_for_lines(page: Any) -> Callable[[str, list[str]], None]:
    """(prefix, texts): wait until the lines below a tab's pictures say this."""
    script = """([prefix, texts]) => texts.every((text, number) => {
        const line = document.querySelector(`#${prefix}-speed-${number} :is(input, textarea)`);
        return line && line.value === text; })"""
    return lambda prefix, texts: page.wait_for_function(script, arg=[prefix, texts], timeout=20000)


def test_a_picture_is_shown_by_both_models_and_follows_the_slider(
    page: Any, wait_for_lines: Callable[[str, list[str]], None], tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "a.jpg"), np.full((90, 120, 3), 90, np.uint8))
    page.set_input_files(PICTURE, str(tmp_path / "a.jpg"))
    wait_for_lines("found", ["Baseline: a: 20.0 FPS (50 ms), 1 found", "Model: b: 100.0 FPS (10 ms), 1 found"])
    for number in (0, 1):
        page.wait_for_function(f"document.querySelector('#found-{number} img').naturalWidth === 120")
    before = page.locator("#found-0 img").get_attribute("src")
    page.locator("#threshold input[type=range]").focus()
    for _ in range(3):  # 0.50 -> 0.35
        page.keyboard.press("ArrowLeft")
    wait_for_lines("found", ["Baseline: a: 20.0 FPS (50 ms), 2 found", "Model: b: 100.0 FPS (10 ms), 1 found"])
    page.wait_for_function("before => document.querySelector('#found-0 img').src !== before", arg=before)


def test_a_file_that_is_no_picture_is_refused_on_the_page(page: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_text("no picture")
    page.set_input_files(PICTURE, str(tmp_path / "bad.jpg"))
    page.wait_for_selector("[data-testid=toast-body]", timeout=20000)
    message = page.locator("[data-testid=toast-body]").inner_text()
    assert "bad.jpg: not a picture" in message and "Traceback" not in message and "/" not in message
    assert page.locator("#found-0 img").count() == 0


def test_a_clip_comes_back_side_by_side_and_plays(
    page: Any, wait_for_lines: Callable[[str, list[str]], None], tmp_path: Path
) -> None:
    with VideoFile(tmp_path / "clip.mp4", 10) as clip:
        for shade in range(4):
            clip.write(np.full((64, 96, 3), 60 * shade, np.uint8))
    page.get_by_role("tab", name="Clip").click()
    page.set_input_files("#clip input[type=file]", str(tmp_path / "clip.mp4"))
    page.wait_for_selector("#clip video", timeout=20000)
    page.get_by_role("button", name="Detect").click()
    page.wait_for_function("document.querySelector('#film video')?.videoWidth === 192", timeout=30000)
    line = page.locator("#film-speed :is(input, textarea)").input_value()
    assert re.fullmatch(r"4 frames \(end of the source\); Baseline: a [\d.]+ FPS, Model: b [\d.]+ FPS", line)


def test_a_large_picture_is_made_smaller_and_unlikely_finds_are_dropped() -> None:
    image, found, times_ms = look(MODELS, np.zeros((100, 2 * LONG_SIDE, 3), np.uint8))
    assert image.shape == (50, LONG_SIDE, 3) and times_ms == [50.0, 10.0]
    assert [len(detections) for detections in found] == [2, 1]


def test_the_command_names_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("serve", ["--model", "absent.onnx"]) == 1
    assert run("serve", ["--score-threshold", "7"]) == 1
    absent, threshold = capsys.readouterr().err.splitlines()
    assert "absent.onnx" in absent and "--score-threshold: expected 0..1" in threshold
