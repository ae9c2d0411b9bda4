"""Training on a run's pairs takes wrong facts out of the instruct model's answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stream_engine.cli.main import main
from stream_engine.demo import checkpoint_path
from stream_engine.demo.loop import HELD_OUT_SEED, LoopSettings, close_loop, sampled_answers
from stream_engine.demo.tiny_llava import load_checkpoint
from stream_engine.demo.world import draw, encode_png, make_picture
from stream_engine.errors import ConfigError
from stream_engine.records import DatasetPair, EncodedImage
from tests.demo_training.answers import write_answer

QUICK = LoopSettings(steps=20, learning_rate=5e-4, pictures=8, answers=4)


def true_pairs(count: int) -> list[DatasetPair]:
    """Pairs of a true answer and one with wrong facts."""
    pairs = []
    for number in range(count):
        picture = make_picture(5, number)
        rng = random.Random(number)
        chosen = write_answer(picture.scene, picture.question, rng)
        rejected = write_answer(picture.scene, picture.question, rng, error_rate=0.9)
        image = EncodedImage(encode_png(draw(picture.scene, rng)))
        pairs.append(
            DatasetPair(
                idx=picture.idx,
                question=picture.question,
                images=(image,),
                chosen=chosen,
                rejected=rejected,
            )
        )
    return pairs


def test_training_on_true_pairs_takes_wrong_facts_away(tmp_path: Path) -> None:
    said: list[str] = []
    report = close_loop(true_pairs(64), QUICK, out=tmp_path / "model", say=said.append)
    assert report.pairs == 64
    assert report.wrong_facts_after < 0.6 * report.wrong_facts_before
    assert said[0].startswith("before: ") and said[-1].startswith("after: ")
    assert main(["verify-checkpoint", str(tmp_path / "model")]) == 0


def test_training_ends_when_the_chosen_answers_have_lost_their_probability() -> None:
    """Plain DPO at a high rate takes it from chosen and rejected alike."""
    said: list[str] = []
    settings = LoopSettings(
        steps=40, learning_rate=2e-3, rpo_alpha=0.0, stop_drop=0.02, pictures=1, answers=1
    )
    report = close_loop(true_pairs(32), settings, say=said.append)
    assert 10 <= report.steps < 40
    assert report.chosen_gain <= -0.02
    assert any(line.startswith("stopped: ") for line in said)


def test_pictures_from_a_number_on_are_others_than_those_before() -> None:
    model = load_checkpoint(checkpoint_path("instruct"))
    settings = LoopSettings(pictures=2, answers=1)
    scenes = [
        {picture.scene for picture, _ in sampled_answers(model, settings, first=first)}
        for first in (0, 2)
    ]
    drawn = [make_picture(HELD_OUT_SEED, number).scene for number in range(4)]
    assert scenes == [set(drawn[:2]), set(drawn[2:])]


def test_pairs_of_another_world_are_refused() -> None:
    (pair,) = true_pairs(1)
    with pytest.raises(ConfigError, match="not of the demo world"):
        close_loop(
            [DatasetPair(idx="7", question="", images=pair.images, chosen="", rejected="")], QUICK
        )
    with pytest.raises(ConfigError, match="no pair"):
        close_loop([], QUICK)
