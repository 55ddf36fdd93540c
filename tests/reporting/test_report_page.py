"""The deployment's page in a browser: on a phone, on a desk, on paper; and against names that attack it."""

import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from norton_deploy.reporting.deployment import ComparedImage, StepRecord
from norton_deploy.reporting.deployment_report import write_report
from tests.reporting.test_deployment import deployment, record

ATTACK = "<img src=x onerror=document.title='broken'>" + "very-long-name" * 8
PLAN = {
    "budget": "speedup=4", "prediction_error": 0.02, "predicted_ms": 20.0, "predicted_speedup": 4.0,
    "measured_ms": 20.4, "measured_speedup": 3.9, "measured_speedup_p10_p90": [3.8, 4.1], "rounds": 8,
    "sensitivity": {"by_layer": False},
    "frontier": [{"ratio": 1.0 + step, "predicted_harm": 0.1 * (1 + step)} for step in range(8)],
    "marks": [{"label": "this plan", "ratio": 4.0, "predicted_harm": 0.4, "measured_harm": 0.3}],
}  # fmt: skip
PARITY = {
    "images": 4, "detections": 9, "precision": "fp32", "passed": True,
    "stages": [{"name": "final", "measure": "box distance, px", "worst": 0.01, "limit": 0.05, "is_lower_bound": False,
                "passed": True},
               {"name": "final", "measure": "share of a mask left out", "worst": 0.1, "limit": None,
                "is_lower_bound": False, "passed": True}],
}  # fmt: skip


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with every section in it and a category that attacks it."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "pictures").mkdir()
    files = [f"pictures/{name}.jpg" for name in "abc"]
    for shade, file in enumerate(files):
        cv2.imwrite(str(folder / file), np.full((90, 120, 3), 60 * shade, np.uint8))
    training = [{"section": "train", "step": step, "losses": {"total": 1 / step}} for step in range(1, 30)]
    training += [{"section": "evaluation", "step": step, "bbox": {"AP": 0.1}} for step in (10, 20)]
    dense, small = record("dense", 0.5, 80.0), record("NORTON", 0.45, 20.0)
    named = [
        replace(model, scores={"bbox": replace(score := model.scores["bbox"], categories=(
            replace(score.categories[0], name=ATTACK), *score.categories[1:]))})
        for model in (dense, small)
    ]  # fmt: skip
    made = deployment(
        title=f"Report of {ATTACK}", dense=named[0], small=named[1], data=ATTACK, plan=PLAN, parity=PARITY,
        compared=(ComparedImage(ATTACK, 5, 4, 2, *files),), training=tuple(training),
        steps=(StepRecord(ATTACK, f"norton deploy --out {ATTACK}", 3.0),), notes=(ATTACK,),
        provenance={"command": ATTACK},
    )  # fmt: skip
    return write_report(folder, made)


@pytest.fixture
def page(browser: Any, report: Path) -> Iterator[Any]:
    """The page in a phone's window; it may ask the network for nothing."""
    opened = browser.new_page(viewport={"width": 390, "height": 844})
    problems: list[str] = []
    opened.on("console", lambda message: problems.append(message.text))
    opened.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
    opened.goto(report.as_uri())
    yield opened
    assert problems == []
    opened.close()


def test_a_phone_shows_the_page_without_scrolling_sideways(page: Any) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.title().startswith("Report of <img")
    tile = page.locator(".figures div").first.bounding_box()
    assert tile["x"] >= 0 and tile["x"] + tile["width"] <= 390
    shot = np.array(Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("L"))
    assert shot.shape[1] == 390 and len(np.unique(shot)) > 50


def test_every_section_picture_and_table_is_there_and_named(page: Any) -> None:
    headings = page.locator("h2").all_inner_texts()
    assert headings == [
        "Beside the paper", "Accuracy", "Pictures", "Speed", "The plan", "Fidelity", "Fine-tuning", "How it was made",
    ]  # fmt: skip
    assert page.locator("nav a").all_inner_texts() == headings
    sizes = page.evaluate("[...document.images].map(image => [image.alt, image.naturalWidth])")
    assert [size for _, size in sizes] == [120] * 3 and all(text for text, _ in sizes)
    drawings = page.locator("svg[role=img]")
    assert drawings.count() == 6
    for drawing in drawings.all():
        assert drawing.get_attribute("aria-label") and drawing.bounding_box()["width"] > 300
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
    for table in page.locator("table").all():
        assert table.locator("thead th").count() == table.locator("thead th[scope=col]").count() > 1
        assert table.locator("tbody tr").count() == table.locator("tbody th[scope=row]").count() > 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(page: Any, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    style = "getComputedStyle(document.documentElement).getPropertyValue"
    colours = {name: page.evaluate(f"{style}('--{name}')") for name in ("ink", "soft", "mark", "paper", "raised")}
    for text in ("ink", "soft", "mark"):
        for ground in ("paper", "raised"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def contrast(first: str, second: str) -> float:
    """WCAG's contrast ratio of two CSS colours (#rgb or #rrggbb)."""

    def luminance(colour: str) -> float:
        digits = colour.strip().lstrip("#")
        digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
        parts = np.array([int(digits[start : start + 2], 16) / 255 for start in (0, 2, 4)])
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    dark, light = sorted((luminance(first), luminance(second)))
    return (light + 0.05) / (dark + 0.05)


def test_paper_gets_everything_but_the_contents(page: Any) -> None:
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.set_viewport_size({"width": 688, "height": 1000})  # A4 without its margins
    assert page.evaluate("document.documentElement.scrollWidth") == 688
    assert page.pdf(prefer_css_page_size=True, print_background=True).startswith(b"%PDF")


def test_the_markdown_has_the_same_and_links_its_pictures(report: Path) -> None:
    text = report.with_suffix(".md").read_text()
    code = "    norton deploy"
    outside = [line for line in text.splitlines() if not line.startswith(code)]
    assert code in text and not any("<img" in line for line in outside) and "&lt;img" in text
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    assert len(links) == 9 and all((report.parent / link).is_file() for link in links)
