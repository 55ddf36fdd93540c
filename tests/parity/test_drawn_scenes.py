"""The drawn scenes that an export is compared on."""

import pytest

from norton_deploy.data.synthetic import draw_scene
from norton_deploy.parity import export_checked
from norton_deploy.parity.export_checked import drawn_scenes
from norton_deploy.structures import TASKS, Task

SIZE = (96, 128)


def people(seed: int) -> int:
    return sum(entry.get("num_keypoints", 0) > 0 for entry in draw_scene(seed, SIZE).annotations)


def test_people_are_in_the_scenes_for_keypoints() -> None:
    with_people = [seed for seed in range(20) if people(seed)]
    assert {1, 3} & set(with_people) == set()  # an empty scene, and one with other things
    found = drawn_scenes("keypoint", 4, SIZE)
    assert [image.tobytes() for image in found] == [draw_scene(seed, SIZE).image.tobytes() for seed in with_people[:4]]


@pytest.mark.parametrize("task", TASKS)
def test_where_nothing_can_be_seen_as_many_are_drawn(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def empty(seed: int, size: tuple[int, int]) -> object:
        drawn.append(seed)
        scene = draw_scene(seed, size)
        scene.annotations.clear()
        return scene

    monkeypatch.setattr(export_checked, "draw_scene", empty)
    found = drawn_scenes(task, 2, SIZE)
    assert len(found) == 2 and {image.shape for image in found} == {(*SIZE, 3)}
    assert len(drawn) == export_checked.MOST_DRAWN * 2
