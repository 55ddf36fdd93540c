"""The picture of a video demo: one panel per model, each with its name and speed, and a line for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from norton_deploy.inference.drawing import draw_detections
from norton_deploy.inference.predictor import Image
from norton_deploy.structures import Categories, Detections

FONT = cv2.FONT_HERSHEY_SIMPLEX
BAR_HEIGHT = 24
BAR_COLOUR = (30, 30, 30)
TEXT_COLOUR = (255, 255, 255)
TEXT_SIZE_PX = 13


@dataclass(frozen=True)
class PanelText:
    """Heading of a panel.

    Attributes:
        label: the model's name.
        fps: frames per second that this model alone allows.
    """

    label: str
    fps: float


def compose_panels(
    image: Image,
    detections: Sequence[Detections],
    categories: Sequence[Categories],
    texts: Sequence[PanelText],
    fps: float | None,
    latency_ms: Sequence[float],
) -> Image:
    """The models' views of one frame side by side.

    Bars above and below hold the text, so that nothing of the frame is covered.

    Args:
        image: the frame, uint8 RGB [H, W, 3].
        detections: of each model.
        categories: of each model.
        texts: headings of the panels.
        fps: frames per second of the whole pipeline, None while unknown.
        latency_ms: recent capture-to-display times of the whole pipeline.

    Returns:
        uint8 RGB [H + 48, W * panels, 3], one row or column more where that would be odd (video codecs
        want even sides).
    """
    panels = [
        np.vstack([_bar(image.shape[1], f"{text.label}: {text.fps:.1f} FPS"), draw_detections(image, found, names)])
        for found, names, text in zip(detections, categories, texts, strict=True)
    ]
    joined = np.hstack(panels)
    footer = "pipeline: measuring"
    if fps is not None and latency_ms:
        p50, p95 = np.percentile(latency_ms, [50, 95])
        footer = f"pipeline: {fps:.1f} FPS, capture to display p50 {p50:.0f} ms, p95 {p95:.0f} ms"
    composed = np.vstack([joined, _bar(joined.shape[1], footer)])
    padding = [(0, composed.shape[0] % 2), (0, composed.shape[1] % 2), (0, 0)]
    return np.pad(composed, padding).astype(np.uint8)


def _bar(width: int, text: str) -> Image:
    """A dark bar uint8 RGB [24, width, 3] with one line of text, made smaller where it would not fit."""
    bar = np.full((BAR_HEIGHT, width, 3), BAR_COLOUR, np.uint8)
    scale = cv2.getFontScaleFromHeight(FONT, TEXT_SIZE_PX, 1)
    text_width = cv2.getTextSize(text, FONT, scale, 1)[0][0]
    scale *= min(1.0, (width - 12) / text_width)
    cv2.putText(bar, text, (6, 17), FONT, scale, TEXT_COLOUR, 1, cv2.LINE_AA)
    return bar
