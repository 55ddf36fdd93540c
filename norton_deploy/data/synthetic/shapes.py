"""Five COCO categories as textured shapes, and shapes that are no category.

Every function draws on a `Canvas` from a random generator alone, so the same generator state gives the same
object; `angle` in radians turns it, `time_s` moves what moves by itself (a clock's hands, a kite's tail).

What carries the class: mostly the outline and the inner drawing (octagon with lettering, panels of a ball,
sectors and tail of a kite, dial with hands, ribs and handle of an umbrella). Each class also has a favourite
hue, used nine times in ten (`COLOUR_HINT`), and other classes and distractors use the same hues.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from norton_deploy.data.synthetic.canvas import Canvas, Colour, Points, capsule, ellipse, random_colour, tint

COLOUR_HINT = 0.9
WHITE: Colour = (240, 240, 236)
BLACK: Colour = (24, 24, 28)

Drawing = Callable[[Canvas, np.random.Generator, Points, float, float, float], None]


def _hinted(rng: np.random.Generator, hue: float) -> Colour:
    hinted = random_colour(rng, hue, (0.6, 1.0), (0.45, 1.0))
    free = random_colour(rng)
    return hinted if rng.uniform() < COLOUR_HINT else free


def _place(local: Points, centre: Points, size: float, angle: float) -> Points:
    """Unit coordinates [..., 2] (the object spans about -0.5..0.5) -> pixels of the image."""
    cos, sin = np.cos(angle), np.sin(angle)
    return centre + size * (np.asarray(local, dtype=float) @ np.array([[cos, sin], [-sin, cos]]))


def _regular(count: int, radius: float, turn: float = 0.0) -> Points:
    around = turn + 2 * np.pi * np.arange(count) / count
    return radius * np.stack([np.cos(around), np.sin(around)], axis=1)


def draw_stop_sign(
    canvas: Canvas, rng: np.random.Generator, centre: Points, size: float, angle: float, time_s: float
) -> None:
    """An octagon with a pale border and four letter-like marks."""
    colour, pale = _hinted(rng, 0.99), tint(WHITE, rng.uniform(0.75, 1.0))
    squeeze = np.array([rng.uniform(0.75, 1.0), 1.0])
    octagon = _regular(8, 0.54, np.pi / 8) * squeeze
    canvas.polygon(_place(octagon, centre, size, angle), pale)
    canvas.polygon(_place(octagon * rng.uniform(0.84, 0.92), centre, size, angle), colour)
    strokes = {  # S, T, O, P on a grid of letter height 0.26
        "S": [[-0.24, -0.13], [-0.36, -0.13], [-0.36, 0.0], [-0.24, 0.0], [-0.24, 0.13], [-0.36, 0.13]],
        "T": [[-0.19, -0.13], [-0.05, -0.13], [-0.12, -0.13], [-0.12, 0.13]],
        "O": [[0.0, -0.13], [0.12, -0.13], [0.12, 0.13], [0.0, 0.13], [0.0, -0.13]],
        "P": [[0.19, 0.13], [0.19, -0.13], [0.33, -0.13], [0.33, 0.0], [0.19, 0.0]],
    }
    for letter in strokes.values():
        canvas.line(_place(np.array(letter) * squeeze, centre, size, angle), 0.045 * size, pale)


def draw_umbrella(
    canvas: Canvas, rng: np.random.Generator, centre: Points, size: float, angle: float, time_s: float
) -> None:
    """A dome of coloured sectors with a scalloped edge, a shaft and a hooked handle."""
    first, second = _hinted(rng, 0.78), random_colour(rng)
    if rng.uniform() < 0.5:
        second = tint(first, rng.uniform(0.6, 0.85))
    shaft = tint(random_colour(rng, saturation=(0, 0.4)), 0.7)
    ribs, height = int(rng.integers(5, 9)), rng.uniform(0.34, 0.5)
    hook = np.array([[0, -0.1], [0, 0.42], [0.03, 0.48], [0.08, 0.48], [0.10, 0.43]])
    canvas.line(_place(hook, centre, size, angle), 0.03 * size, shaft)
    edges = np.sin(np.linspace(-np.pi / 2, np.pi / 2, ribs + 1)) * 0.5
    sweep = np.linspace(0, 1, 8)
    for index in range(ribs):
        # Ribs are quarter-ellipse arcs from the top to the edge; the edge itself sags between two ribs.
        left_x, right_x = edges[index], edges[index + 1]
        arc = np.stack([np.sin(sweep * np.pi / 2), -np.cos(sweep * np.pi / 2) * height], axis=1)
        scallop_x = right_x + (left_x - right_x) * sweep
        scallop = np.stack([scallop_x, -0.05 * np.sin(np.pi * sweep)], axis=1)
        sector = np.concatenate([arc * [left_x, 1], np.flip(scallop, axis=0), np.flip(arc * [right_x, 1], axis=0)])
        canvas.polygon(_place(sector, centre, size, angle), first if index % 2 == 0 else second)
        canvas.line(_place(arc * [right_x, 1], centre, size, angle), 0.01 * size, tint(first, 0.6))
    canvas.line(_place(np.array([[0, -height], [0, -height - 0.06]]), centre, size, angle), 0.025 * size, shaft)


def draw_sports_ball(
    canvas: Canvas, rng: np.random.Generator, centre: Points, size: float, angle: float, time_s: float
) -> None:
    """A ball: football panels, basketball seams, a tennis ball's curve or a beach ball's sectors."""
    colour, kind = _hinted(rng, 0.08), int(rng.integers(4))
    spin = angle + rng.uniform(0, 2 * np.pi) + 0.8 * time_s
    radius, dark = 0.5 * size, tint(colour, 0.35)
    if kind == 0 and rng.uniform() < 0.6:
        colour, dark = tint(WHITE, rng.uniform(0.8, 1.0)), BLACK
    canvas.polygon(ellipse(centre, radius, radius), colour)
    seam = max(0.03 * size, 0.4)
    if kind == 0:
        patches = [_regular(5, 0.17, spin)]
        for turn in spin + 2 * np.pi * np.arange(5) / 5:
            out = np.array([np.cos(turn), np.sin(turn)])
            patches.append(_regular(5, 0.13, turn) * 0.9 + 0.40 * out)
            canvas.line(_place(np.stack([0.15 * out, 0.3 * out]), centre, size, 0.0), seam, dark)
        for patch in patches:
            far = np.maximum(np.linalg.norm(patch, axis=1, keepdims=True) / 0.49, 1.0)
            canvas.polygon(_place(patch / far, centre, size, 0.0), dark)
    elif kind == 1:
        sweep = np.linspace(-0.5, 0.5, 15)
        for bend in (0.0, 0.28, -0.28):
            curve = np.stack([sweep, bend * (1.55 - 5.0 * sweep**2)], axis=1)
            curve /= np.maximum(np.linalg.norm(curve, axis=1, keepdims=True) / 0.49, 1.0)
            canvas.line(_place(curve, centre, size, spin), seam, dark)
        canvas.line(_place(np.array([[0, -0.49], [0, 0.49]]), centre, size, spin), seam, dark)
    elif kind == 2:
        sweep = np.linspace(-0.8, 0.8, 13)
        for side in (-1, 1):
            curve = np.stack([side * (0.52 - 0.38 * np.cos(sweep * 1.6)), 0.55 * sweep], axis=1)
            curve /= np.maximum(np.linalg.norm(curve, axis=1, keepdims=True) / 0.49, 1.0)
            canvas.line(_place(curve, centre, size, spin), 1.4 * seam, tint(WHITE, 0.95))
    else:
        shades = [colour, WHITE, random_colour(rng), WHITE, random_colour(rng), WHITE]
        pole = 0.2 * np.array([np.cos(spin), np.sin(spin)])
        rim = _regular(36, 0.5, spin)
        for index, shade in enumerate(shades):
            sector = np.concatenate([[pole], rim[6 * index : 6 * index + 6], [rim[(6 * index + 6) % 36]]])
            canvas.polygon(_place(sector, centre, size, 0.0), shade)
    glint = centre + radius * np.array([-0.35, -0.4])
    canvas.polygon(ellipse(glint, 0.12 * size, 0.08 * size, 0.7), tint(colour, 1.5))


def draw_kite(
    canvas: Canvas, rng: np.random.Generator, centre: Points, size: float, angle: float, time_s: float
) -> None:
    """A diamond of two or four coloured sectors with spars and a waving tail of bows."""
    first = _hinted(rng, 0.55)
    shades = [first, random_colour(rng), first, random_colour(rng)]
    if rng.uniform() < 0.4:
        shades[1] = shades[3] = tint(first, 0.7)
    half_width, cross = rng.uniform(0.26, 0.4), rng.uniform(-0.2, -0.08)
    tips = np.array([[0, -0.5], [half_width, cross], [0, 0.3], [-half_width, cross]])
    phase, sway = rng.uniform(0, 2 * np.pi), rng.uniform(0.02, 0.07)
    down = np.linspace(0, 1, 14)
    tail = np.stack([sway * down * np.sin(9 * down + phase + 3.0 * time_s) * 2, 0.3 + 0.42 * down], axis=1)
    canvas.line(_place(tail, centre, size, angle), max(0.018 * size, 0.7), tint(shades[1], 0.8))
    for index in (5, 9, 13):
        bow = tail[index] + np.array([[-0.05, -0.03], [0.05, 0.03], [0.05, -0.03], [-0.05, 0.03]])
        canvas.polygon(_place(bow, centre, size, angle), shades[index % 2])
    hub = np.array([0.0, cross])
    for index in range(4):
        sector = np.stack([hub, tips[index], tips[(index + 1) % 4]])
        canvas.polygon(_place(sector, centre, size, angle), shades[index])
    spar = tint(first, 0.45)
    canvas.line(_place(tips[[0, 2]], centre, size, angle), max(0.012 * size, 0.4), spar)
    canvas.line(_place(tips[[1, 3]], centre, size, angle), max(0.012 * size, 0.4), spar)


def draw_clock(
    canvas: Canvas, rng: np.random.Generator, centre: Points, size: float, angle: float, time_s: float
) -> None:
    """A round or square dial with a rim, twelve marks and two hands."""
    rim, dial = _hinted(rng, 0.12), tint(WHITE, rng.uniform(0.7, 1.05))
    ink, squeeze = BLACK, rng.uniform(0.7, 1.0)
    if rng.uniform() < 0.25:
        dial, ink = random_colour(rng, value=(0.15, 0.4)), WHITE
    border, square, minutes = rng.uniform(0.04, 0.09), rng.uniform() < 0.25, rng.uniform(0, 720) + 6.0 * time_s
    outline = _regular(4, 0.66, np.pi / 4) if square else _regular(40, 0.5)
    flat = np.array([squeeze, 1.0])
    canvas.polygon(_place(outline * flat, centre, size, angle), rim)
    canvas.polygon(_place(outline * flat * (1 - 2 * border), centre, size, angle), dial)
    for turn in 2 * np.pi * np.arange(12) / 12:
        out = np.array([np.sin(turn), -np.cos(turn)]) * flat
        canvas.line(_place(np.stack([0.33 * out, 0.39 * out]), centre, size, angle), 0.03 * size, ink)
    for turn, length, width in ((minutes / 720, 0.2, 0.05), (minutes / 60, 0.31, 0.03)):
        out = np.array([np.sin(2 * np.pi * turn), -np.cos(2 * np.pi * turn)]) * flat
        canvas.line(_place(np.stack([-0.05 * out, length * out]), centre, size, angle), width * size, ink)


def draw_distractor(
    canvas: Canvas, rng: np.random.Generator, centre: Points, size: float, angle: float, time_s: float
) -> None:
    """Something that is no category: a polygon, disc, star, blob, bar, ring or bush."""
    colour, other, kind = random_colour(rng), random_colour(rng), int(rng.integers(7))
    if kind == 0:  # never eight corners: that would be a stop sign
        canvas.polygon(_place(_regular(int(rng.choice([3, 4, 5, 6])), 0.5), centre, size, angle), colour)
    elif kind == 1:
        canvas.polygon(ellipse(centre, 0.5 * size, rng.uniform(0.25, 0.5) * size, angle), colour)
        canvas.stripes(1, other, max(0.25 * size, 2.0), angle)
    elif kind == 2:
        star = _regular(10, 0.5) * np.where(np.arange(10) % 2, 0.45, 1.0)[:, None]
        canvas.polygon(_place(star, centre, size, angle), colour)
    elif kind == 3:
        blob = _regular(12, 0.4) * rng.uniform(0.6, 1.25, (12, 1))
        canvas.polygon(_place(blob, centre, size, angle), colour)
    elif kind == 4:
        reach = 0.5 * np.array([np.cos(angle), np.sin(angle)]) * size
        canvas.polygon(capsule(centre - reach, centre + reach, 0.08 * size, 0.05 * size), colour)
    elif kind == 5:
        box = np.array([[-0.5, -0.3], [0.5, -0.3], [0.5, 0.3], [-0.5, 0.3]])
        canvas.polygon(_place(box, centre, size, angle), colour)
        canvas.polygon(_place(box * rng.uniform(0.5, 0.8), centre, size, angle), other)
    else:
        for _ in range(9):
            offset = rng.uniform(-0.3, 0.3, 2) * size
            shade = tint(colour, rng.uniform(0.6, 1.2))
            canvas.polygon(ellipse(centre + offset, 0.17 * size, 0.17 * size, count=10), shade)


# COCO category id -> (name, supercategory, drawing function).
SHAPES: dict[int, tuple[str, str, Drawing]] = {
    13: ("stop sign", "outdoor", draw_stop_sign),
    28: ("umbrella", "accessory", draw_umbrella),
    37: ("sports ball", "sports", draw_sports_ball),
    38: ("kite", "sports", draw_kite),
    85: ("clock", "indoor", draw_clock),
}
