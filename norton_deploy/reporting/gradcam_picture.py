"""Grad-CAM's maps over their images, all models side by side."""

import textwrap
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from norton_deploy.compression.fit_plan import BODY
from norton_deploy.files import atomic_write
from norton_deploy.reporting.gradcam import DENSE, GradcamComparison, map_correlation

PANEL_LETTERS = 20
PANEL_INCHES = 1.7


def draw_gradcam(path: Path, comparison: GradcamComparison) -> None:
    """A picture of maps over their images: a row per image; the image, then for each layer all models.

    Args:
        path: .png or .jpg to write.
        comparison: whose rows are drawn; the dense model's maps come first.
    """
    rows = comparison.rows
    models = [DENSE, *comparison.correlation]
    from pytorch_grad_cam.utils.image import show_cam_on_image

    layers = list(rows[0][2][models[0]])
    columns = 1 + len(layers) * len(models)
    figure = Figure(figsize=(PANEL_INCHES * columns, PANEL_INCHES * len(rows) + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (question, label, maps) in zip(axes, rows, strict=True):
        panels = [(label, question.picture)]
        for layer in layers:
            for model in models:
                over = show_cam_on_image(question.picture, maps[model][layer], use_rgb=True)
                correlation = None if model == DENSE else map_correlation(maps[DENSE][layer], maps[model][layer])
                panels.append(("" if correlation is None else f"r = {correlation:.2f}", over))
        for axis, (caption, panel) in zip(line, panels, strict=True):
            axis.imshow(panel)
            axis.set_xlabel(caption, fontsize=7)
            axis.set_xticks([])
            axis.set_yticks([])
            if question.box is not None:
                x1, y1, x2, y2 = question.box[0].tolist()
                axis.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="white", linewidth=1)
    wrapped = {model: textwrap.fill(model, PANEL_LETTERS) for model in models}
    headings = ["image", *(f"{layer.removeprefix(BODY)}\n{wrapped[model]}" for layer in layers for model in models)]
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(heading, fontsize=8)
    with atomic_write(path) as stream:
        figure.savefig(stream, format=path.suffix.removeprefix("."), dpi=120)
