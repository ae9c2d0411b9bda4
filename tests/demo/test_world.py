import random

import pytest

from stream_engine.demo.world import PLACES, make_picture, random_scene, scene_of
from stream_engine.errors import ConfigError


def test_same_seed_and_number_give_the_same_picture() -> None:
    assert make_picture(5, 17) == make_picture(5, 17)


def test_seed_and_number_both_matter() -> None:
    pictures = [make_picture(5, 17), make_picture(5, 18), make_picture(6, 17)]
    assert len({picture.png for picture in pictures}) == 3


def test_truth_is_had_again_from_the_idx() -> None:
    for number in range(50):
        picture = make_picture(9, number)
        assert scene_of(picture.idx) == picture.scene


@pytest.mark.parametrize("idx", ["", "12", "shapes-7", "shapes-x-000001", "shapes-7-000012-2"])
def test_foreign_idx_is_refused(idx: str) -> None:
    with pytest.raises(ConfigError, match="not of the demo world"):
        scene_of(idx)


def test_scenes_hold_one_to_four_shapes_and_use_every_place() -> None:
    rng = random.Random(0)
    scenes = [random_scene(rng) for _ in range(300)]
    assert {len(scene.shapes()) for scene in scenes} == {1, 2, 3, 4}
    assert all(any(scene.at(place) for scene in scenes) for place in PLACES)


def test_all_kinds_of_question_are_asked() -> None:
    questions = [make_picture(0, number).question for number in range(200)]
    starts = ("Describe", "What can you see", "What is in", "How many", "Is there", "What colour")
    for start in starts:
        assert any(question.startswith(start) for question in questions), start
