"""Training on a run's pairs takes wrong facts out of the instruct model's answers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from stream_engine.cli.main import main
from stream_engine.demo.loop import LoopSettings, close_loop, dpo_loss
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


def test_the_loss_is_dpos_with_the_likelihood_of_the_chosen() -> None:
    logps = torch.tensor([[-1.0, -2.0, 0.0], [-4.0, -1.0, -1.0]])
    is_answer = torch.tensor([[True, True, False], [True, True, True]])
    ref = torch.tensor([-3.5, -5.0])
    margins = (-3.0 + 3.5) - (-6.0 + 5.0)
    expected = -torch.nn.functional.logsigmoid(torch.tensor(0.1 * margins))
    assert dpo_loss(logps, ref, is_answer, 0.1, 0.0) == pytest.approx(expected.item())
    assert dpo_loss(logps, ref, is_answer, 0.1, 2.0) == pytest.approx(expected.item() + 2 * 1.5)


def test_pairs_of_another_world_are_refused() -> None:
    (pair,) = true_pairs(1)
    with pytest.raises(ConfigError, match="not of the demo world"):
        close_loop(
            [DatasetPair(idx="7", question="", images=pair.images, chosen="", rejected="")], QUICK
        )
    with pytest.raises(ConfigError, match="no pair"):
        close_loop([], QUICK)
