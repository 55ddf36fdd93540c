"""Articulated people with the 17 COCO keypoints: a posed 3-D skeleton drawn as shaded limbs.

The skeleton's unit is the body's height; x to the viewer's right, y down, z towards the viewer. A person who
faces the viewer therefore has the left shoulder at positive x.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from norton_deploy.data.synthetic.canvas import Canvas, Colour, Points, capsule, ellipse, random_colour, tint

KEYPOINTS = (
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder",
    "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip",
    "left_knee", "right_knee", "left_ankle", "right_ankle",
)  # fmt: skip
# One-based pairs, as in COCO's category entry.
SKELETON = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
REACH = 0.85  # no part of a body is farther from its pelvis than this, in body heights

SKIN_TONES: tuple[Colour, ...] = (
    (255, 219, 190), (238, 195, 160), (214, 165, 125), (180, 128, 90), (134, 90, 62), (88, 58, 42),
)  # fmt: skip

# Joint angles in radians; arms and legs are (left, right). "forward" swings in the walking direction,
# "side" spreads outwards, "bend" closes elbow or knee, "beat" is how far the limb swings with time.
_ARM_POSES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "down": ((0.05, 0.15, 0.15), (0.05, 0.15, 0.15)),
    "walk": ((0.55, 0.12, 0.45), (-0.55, 0.12, 0.35)),
    "run": ((0.9, 0.15, 1.5), (-0.8, 0.15, 1.4)),
    "wave": ((0.1, 2.5, 0.5), (0.1, 0.2, 0.2)),
    "up": ((0.1, 2.7, 0.3), (0.1, 2.7, 0.3)),
    "spread": ((0.0, 1.5, 0.1), (0.0, 1.5, 0.1)),
    "carry": ((0.7, 0.2, 1.1), (0.7, 0.2, 1.1)),
    "reach": ((1.6, 0.1, 0.1), (1.2, 0.2, 0.5)),
}
_LEG_POSES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "stand": ((0.0, 0.08, 0.02), (0.0, 0.08, 0.02)),
    "walk": ((-0.4, 0.05, 0.2), (0.45, 0.05, 0.1)),
    "run": ((-0.6, 0.05, 1.2), (0.9, 0.05, 0.9)),
    "wide": ((0.0, 0.5, 0.0), (0.0, 0.5, 0.0)),
    "sit": ((1.45, 0.2, 1.45), (1.4, 0.2, 1.5)),
    "kick": ((1.1, 0.1, 0.1), (-0.1, 0.1, 0.2)),
    "squat": ((1.2, 0.5, 1.9), (1.2, 0.5, 1.9)),
}
_SWINGING_ARMS = ("walk", "run", "wave")


@dataclass(frozen=True)
class Skeleton:
    """A posed body around its pelvis, in body heights.

    Attributes:
        keypoints: [17, 3] x, y, z in COCO's order.
        neck, head, crown: [3] the points that COCO has not: base of the neck, middle and top of the head.
        facing: [3] unit vector of the nose's direction.
    """

    keypoints: npt.NDArray[np.float64]
    neck: npt.NDArray[np.float64]
    head: npt.NDArray[np.float64]
    crown: npt.NDArray[np.float64]
    facing: npt.NDArray[np.float64]


def _direction(forward: float, side: float) -> npt.NDArray[np.float64]:
    """Unit vector of a limb that hangs down at 0, 0; positive x is outwards, positive z forward."""
    return np.array([np.sin(side), np.cos(side) * np.cos(forward), np.cos(side) * np.sin(forward)])


def pose_skeleton(rng: np.random.Generator, time_s: float = 0.0) -> Skeleton:
    """Draw a random pose; with `time_s` arms and legs swing and the trunk sways around it."""
    arm_pose = str(rng.choice(list(_ARM_POSES)))
    leg_pose = str(rng.choice(list(_LEG_POSES), p=[0.28, 0.24, 0.12, 0.1, 0.12, 0.07, 0.07]))
    arms = np.array(_ARM_POSES[arm_pose]) + rng.normal(0, 0.14, (2, 3))
    legs = np.array(_LEG_POSES[leg_pose]) + rng.normal(0, 0.07, (2, 3))
    if rng.uniform() < 0.5:
        arms, legs = arms[::-1], legs[::-1]
    phase, tempo = rng.uniform(0, 2 * np.pi), rng.uniform(4.0, 7.0)
    beat = np.sin(tempo * time_s + phase) - np.sin(phase)
    swing = 0.35 if leg_pose in ("walk", "run") else 0.0
    legs = legs + np.array([[1, 0, 0.3], [-1, 0, 0.3]]) * swing * beat
    lift = 0.3 if arm_pose in _SWINGING_ARMS else 0.06
    axis = [0, 1, 0] if arm_pose == "wave" else [1, 0, 0]
    arms = arms + np.array([axis, [-1 * part for part in axis]]) * lift * beat
    arms[:, 2], legs[:, 2] = np.clip(arms[:, 2], 0, 2.3), np.clip(legs[:, 2], 0, 2.2)

    lean, tilt = rng.normal(0.05, 0.12), rng.normal(0, 0.08)
    trunk = np.array([np.sin(tilt), -np.cos(tilt) * np.cos(lean), np.sin(lean)])
    neck = 0.31 * trunk
    nod = rng.normal(0, 0.08)
    head = neck + 0.115 * (trunk + np.array([nod, 0, 0.15]))
    crown = head + 0.085 * trunk
    look = rng.normal(0, 0.35)  # the head's own turn to the side
    facing = np.array([np.sin(look), 0.0, np.cos(look)])
    aside = np.array([np.cos(look), 0.0, -np.sin(look)])
    points = np.zeros((17, 3))
    points[0] = head + 0.082 * facing + [0, 0.012, 0]
    for index, sign in ((0, 1), (1, -1)):  # 0 left, 1 right
        points[1 + index] = head + 0.07 * facing + sign * 0.031 * aside - [0, 0.018, 0]
        points[3 + index] = head + sign * 0.074 * aside
        shoulder = neck * 0.93 + [sign * 0.115, 0, 0]
        hip = np.array([sign * 0.07, 0, 0])
        forward, side, bend = arms[index]
        outwards = np.array([sign, 1, 1])
        elbow = shoulder + 0.17 * outwards * _direction(forward, side)
        wrist = elbow + 0.155 * outwards * _direction(forward + bend, side + 0.2 * bend * (side > 1))
        forward, side, bend = legs[index]
        knee = hip + 0.245 * outwards * _direction(forward, side)
        ankle = knee + 0.235 * outwards * _direction(forward - bend, 0.6 * side)
        for first, joint in ((5, shoulder), (7, elbow), (9, wrist), (11, hip), (13, knee), (15, ankle)):
            points[first + index] = joint

    yaw = rng.uniform(-np.pi, np.pi) if rng.uniform() < 0.5 else rng.normal(0, 0.5)
    turn = rng.uniform()
    roll = rng.normal(0, 0.06)
    if turn < 0.08:  # lying down
        roll += rng.choice([-1, 1]) * np.pi / 2
    elif turn < 0.11:  # cartwheel, hanging, diving
        roll = rng.uniform(-np.pi, np.pi)
    roll += 0.05 * beat
    cos, sin = np.cos(yaw), np.sin(yaw)
    about_vertical = np.array([[cos, 0, sin], [0, 1, 0], [-sin, 0, cos]])
    cos, sin = np.cos(roll), np.sin(roll)
    about_view = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    rotation = about_view @ about_vertical
    return Skeleton(*(array @ rotation.T for array in (points, neck, head, crown, facing)))


@dataclass(frozen=True)
class _Part:
    """One drawn piece: its depth (larger is nearer), outline, colour and the keypoints that lie on it."""

    depth: float
    outline: Points
    colour: Colour
    keypoints: tuple[int, ...] = ()


def _clothes(rng: np.random.Generator) -> dict[str, Colour]:
    skin = tint(SKIN_TONES[int(rng.integers(len(SKIN_TONES)))], rng.uniform(0.9, 1.05))
    shirt = random_colour(rng, value=(0.15, 1.0))
    trousers = random_colour(rng, saturation=(0.0, 0.8), value=(0.1, 0.85))
    sleeve = shirt if rng.uniform() < 0.75 else skin
    return {
        "skin": skin,
        "shirt": shirt,
        "sleeve": sleeve,
        "forearm": shirt if sleeve == shirt and rng.uniform() < 0.5 else skin,
        "trousers": trousers,
        "shin": trousers if rng.uniform() < 0.7 else skin,
        "shoe": random_colour(rng, saturation=(0, 0.6), value=(0.05, 0.9)),
        "hair": random_colour(rng, 0.07, (0.1, 0.8), (0.05, 0.7)),
    }


def _body_parts(
    body: Skeleton, points: Points, scale: float, clothes: dict[str, Colour], build: float, skirt: bool
) -> list[_Part]:
    """Limbs, trunk and feet as outlines in image pixels; `points` [17, 2] are the projected keypoints."""
    depth = body.keypoints[:, 2]
    neck = points[5:7].mean(axis=0)

    def limb(first: int, second: int, radii: tuple[float, float], colour: Colour, nearer: float) -> _Part:
        outline = capsule(points[first], points[second], radii[0] * scale * build, radii[1] * scale * build)
        return _Part(float(depth[[first, second]].mean()) + nearer, outline, colour, (first, second))

    parts = []
    for side in (0, 1):
        shade = 1.0 if depth[11 + side] >= depth[12 - side] else 0.88
        colour = {name: tint(value, shade) for name, value in clothes.items()}
        parts.append(limb(5 + side, 7 + side, (0.036, 0.029), colour["sleeve"], 0.035))
        parts.append(limb(7 + side, 9 + side, (0.028, 0.021), colour["forearm"], 0.04))
        parts.append(limb(11 + side, 13 + side, (0.052, 0.038), colour["trousers"], -0.005))
        parts.append(limb(13 + side, 15 + side, (0.037, 0.024), colour["shin"], -0.002))
        hand = points[9 + side] + 0.25 * (points[9 + side] - points[7 + side])
        radius = 0.026 * scale
        palm = ellipse(hand, radius, radius, count=10)
        parts.append(_Part(float(depth[9 + side]) + 0.05, palm, colour["skin"], (9 + side,)))
        shin = points[15 + side] - points[13 + side]
        length = float(np.hypot(*shin)) + 1e-6
        toe = points[15 + side] + 0.03 * scale * shin / length + 0.055 * scale * body.facing[:2]
        outline = capsule(points[15 + side] + 0.015 * scale * shin / length, toe, 0.026 * scale, 0.02 * scale)
        parts.append(_Part(float(depth[15 + side]) + 0.01, outline, colour["shoe"], (15 + side,)))
    # The trunk is the outline of four discs at shoulders and hips, so that it keeps its width in profile.
    shoulders = capsule(points[5], points[6], 0.04 * scale * build, 0.04 * scale * build)
    hips = capsule(points[11], points[12], 0.062 * scale * build, 0.062 * scale * build)
    parts.append(_Part(0.0, convex_outline(shoulders, hips), clothes["shirt"], (5, 6, 11, 12)))
    if skirt:
        hem = 0.35 * points[11:13].mean(0) + 0.65 * points[13:15]
        waist = capsule(points[11], points[12], 0.06 * scale * build, 0.06 * scale * build)
        cloth = convex_outline(waist, capsule(hem[0], hem[1], 0.07 * scale, 0.07 * scale))
        parts.append(_Part(0.02, cloth, clothes["trousers"], (11, 12)))
    throat = capsule(neck, points[3:5].mean(axis=0), 0.03 * scale, 0.03 * scale)
    parts.append(_Part(0.001 + float(body.head[2]) * 0.5, throat, clothes["skin"]))
    return parts


def convex_outline(*outlines: Points) -> Points:
    """Convex hull [P, 2] of outlines [N, 2]."""
    return np.asarray(cv2.convexHull(np.concatenate(outlines).astype(np.float32))).reshape(-1, 2).astype(float)


def _head_parts(
    body: Skeleton, origin: Points, scale: float, clothes: dict[str, Colour], hat: bool, long_hair: bool
) -> list[_Part]:
    """Hair, face, eyes and hat; the face is turned away with the head and gone from behind."""
    head = origin + scale * body.head[:2]
    up = body.crown[:2] - body.head[:2]
    up = up / (np.hypot(*up) + 1e-6)
    angle = float(np.arctan2(up[0], -up[1]))
    depth = float(body.head[2]) + 0.03
    hair = ellipse(head + 0.006 * scale * up, 0.076 * scale, 0.09 * scale, angle)
    parts = [_Part(depth, hair, clothes["hair"], (0, 1, 2, 3, 4))]
    if long_hair:
        fall = capsule(head, head - 0.11 * scale * up, 0.075 * scale, 0.06 * scale)
        parts.append(_Part(depth - 0.02 if body.facing[2] > 0 else depth + 0.001, fall, clothes["hair"], (3, 4)))
    if body.facing[2] > -0.35:
        seen = float(np.clip(0.35 + body.facing[2], 0.0, 1.0)) ** 0.5
        centre = head + scale * (0.030 * body.facing[:2] - 0.012 * up)
        face = ellipse(centre, 0.062 * scale * (0.55 + 0.45 * seen), 0.076 * scale, angle)
        parts.append(_Part(depth + 0.002, face, clothes["skin"], (0, 1, 2, 3, 4)))
        for eye in (1, 2):
            place = origin + scale * body.keypoints[eye, :2]
            if body.keypoints[eye, 2] > body.head[2] + 0.01:
                dot = ellipse(place, 0.011 * scale, 0.011 * scale, count=8)
                parts.append(_Part(depth + 0.003, dot, (30, 24, 24), (eye,)))
        mouth = origin + scale * body.keypoints[0, :2] - 0.035 * scale * up
        if body.facing[2] > 0.3:
            lips = ellipse(mouth, 0.022 * scale, 0.007 * scale, angle, count=8)
            parts.append(_Part(depth + 0.003, lips, tint(clothes["skin"], 0.6)))
    if hat:
        brim = ellipse(head + 0.045 * scale * up, 0.105 * scale, 0.02 * scale, angle, count=16)
        top = ellipse(head + 0.075 * scale * up, 0.068 * scale, 0.045 * scale, angle, count=16)
        parts.append(_Part(depth + 0.004, top, clothes["shoe"]))
        parts.append(_Part(depth + 0.005, brim, tint(clothes["shoe"], 0.8)))
    return parts


def draw_person(
    canvas: Canvas, rng: np.random.Generator, pelvis: Points, height: float, time_s: float = 0.0
) -> npt.NDArray[np.float64]:
    """Draw one person and return keypoints [17, 3]: x, y in image pixels, v = 2 visible or 1 hidden by itself.

    Args:
        canvas: must reach `REACH * height` around `pelvis`, or the body is cut.
        rng: decides pose, build and clothes; the same state gives the same person.
        pelvis: x, y in pixels.
        height: of the standing body, in pixels.
        time_s: seconds; arms and legs swing with it.
    """
    body = pose_skeleton(rng, time_s)
    clothes, build = _clothes(rng), rng.uniform(0.85, 1.25)
    hat, long_hair, skirt, striped = rng.uniform(size=4) < (0.2, 0.35, 0.2, 0.3)
    prop = int(rng.integers(8))  # 0 bag, 1 stick, else nothing
    prop_colour, stripe_colour, stripe_angle = random_colour(rng), random_colour(rng), rng.choice([0.0, np.pi / 2])
    origin = np.asarray(pelvis, dtype=float)
    points = origin + height * body.keypoints[:, :2]
    parts = _body_parts(body, points, height, clothes, build, bool(skirt))
    parts += _head_parts(body, origin, height, clothes, bool(hat), bool(long_hair))
    if prop == 0:
        bag = points[9] + height * np.array([[-0.05, 0.02], [0.05, 0.02], [0.06, 0.12], [-0.06, 0.12]])
        parts.append(_Part(float(body.keypoints[9, 2]) + 0.06, bag, prop_colour))
    elif prop == 1:
        stick = capsule(points[10] + height * np.array([0.02, -0.18]), points[10] + height * np.array([-0.03, 0.25]),
                        0.009 * height, 0.009 * height)  # fmt: skip
        parts.append(_Part(float(body.keypoints[10, 2]) + 0.03, stick, prop_colour))
    parts.sort(key=lambda part: part.depth)
    on_keypoint: list[set[int]] = [set() for _ in KEYPOINTS]
    for number, part in enumerate(parts, start=1):
        canvas.polygon(part.outline, part.colour, number)
        for keypoint in part.keypoints:
            on_keypoint[keypoint].add(number)
        if striped and part.keypoints == (5, 6, 11, 12):
            canvas.stripes(number, stripe_colour, 0.05 * height, float(stripe_angle))
    keypoints = np.concatenate([points, np.full((17, 1), 2.0)], axis=1)
    for index in range(17):
        behind_head = index < 5 and body.keypoints[index, 2] < body.head[2] - 0.02
        if behind_head or canvas.part_at(points[index]) not in on_keypoint[index]:
            keypoints[index, 2] = 1.0
    return keypoints
