"""What is shown of a pair: the question with its pictures' places, ranks, facts, flips."""

from __future__ import annotations

import msgspec
import pytest

from stream_engine.records import PreferencePair
from stream_engine.report.entries import MAX_SHOWN, cut, entry_of, shown_question
from tests.synthetic import synthetic_rewards, synthetic_rollouts, synthetic_sample

SAMPLE = synthetic_sample(1)
ROLLOUTS = synthetic_rollouts(SAMPLE)
REWARDS = synthetic_rewards(ROLLOUTS)
PAIR = PreferencePair(key=SAMPLE.key, chosen=2, rejected=3, chosen_score=1.0, rejected_score=-1.0)


@pytest.mark.parametrize(
    ("question", "num_images", "shown"),
    [
        ("What is this?", 1, "What is this?"),
        ("<image>\nWhat is this?", 1, "What is this?"),
        ("Is <image> like <image>?", 2, "Is [picture 1] like [picture 2]?"),
        ("<image>One. <image>Two.", 2, "One. [picture 2]Two."),
    ],
)
def test_pictures_stand_where_the_model_saw_them(
    question: str, num_images: int, shown: str
) -> None:
    assert shown_question(question, num_images) == shown


def test_answers_are_in_order_of_rank_and_those_without_a_score_last() -> None:
    entry = entry_of(SAMPLE, ROLLOUTS, REWARDS, PAIR, fate="kept")
    scores = [answer.score for answer in entry.answers]
    assert scores[:-1] == sorted((s for s in scores if s is not None), reverse=True)
    assert [answer.rank for answer in entry.answers] == [*range(1, 10), None]
    assert entry.answers[-1].unscored == "no_tokens"
    assert entry.id == f"{SAMPLE.key}-2-3"


def test_a_copy_has_the_facts_of_the_answer_that_it_is_a_copy_of() -> None:
    facts = [{"fact": "f", "question": "q", "holds": True, "p_yes": 1.0, "p_no": 0.0}]
    scores = {score.index: score for score in REWARDS.scores}
    scores[2] = msgspec.structs.replace(scores[2], details={"facts": facts})
    scores[3] = msgspec.structs.replace(scores[3], details={"same_text_as": 2})
    rewards = msgspec.structs.replace(REWARDS, scores=list(scores.values()))
    entry = entry_of(SAMPLE, ROLLOUTS, rewards, PAIR, fate="kept")
    by_index = {answer.index: answer for answer in entry.answers}
    assert by_index[3].facts == by_index[2].facts == facts
    assert by_index[4].facts == []


@pytest.mark.parametrize(
    ("verdicts", "is_flip"),
    [
        (("first", "first"), True),
        (("second", "second"), True),
        (("first", "second"), False),
        (("equal", "equal"), False),
        (("first",), False),
    ],
)
def test_a_flip_is_one_place_named_in_both_orders(verdicts: tuple[str, ...], is_flip: bool) -> None:
    comparisons = [
        {"first": first, "second": second, "verdict": verdict, "reply": verdict}
        for (first, second), verdict in zip(((2, 3), (3, 2)), verdicts)
    ]
    rewards = msgspec.structs.replace(REWARDS, details={"comparisons": comparisons})
    entry = entry_of(SAMPLE, ROLLOUTS, rewards, PAIR, fate="kept")
    assert entry.is_flip == is_flip
    assert [one.verdict for one in entry.critiques] == list(verdicts)


def test_a_cut_text_says_how_much_is_missing() -> None:
    assert cut("x" * MAX_SHOWN) == "x" * MAX_SHOWN
    assert cut("x" * (MAX_SHOWN + 1500)).endswith("[... 1,500 more characters]")


def test_without_the_tokenizer_tokens_are_shown_by_their_numbers() -> None:
    scores = [
        msgspec.structs.replace(score, token_logps=ROLLOUTS.answers[score.index].scored_logps)
        for score in REWARDS.scores
    ]
    rewards = msgspec.structs.replace(REWARDS, scores=scores)
    entry = entry_of(SAMPLE, ROLLOUTS, rewards, PAIR, fate="kept")
    assert entry.chosen is not None
    numbers = [f"#{token_id} " for token_id in ROLLOUTS.answers[2].scored_ids]
    assert [token.text for token in entry.chosen.heat] == numbers


def test_an_answer_of_the_input_says_who_wrote_it_and_its_side() -> None:
    first, *others = ROLLOUTS.answers
    brought = msgspec.structs.replace(first, ids_from_text=True, model="m", given_as="rejected")
    rollouts = msgspec.structs.replace(ROLLOUTS, answers=[brought, *others])
    entry = entry_of(SAMPLE, rollouts, REWARDS, PAIR, fate="kept")
    origins = {answer.index: answer.origin for answer in entry.answers}
    assert origins[0] == "brought along by m, given as rejected"
    assert set(origins.values()) == {origins[0], ""}
