"""Several questions about one picture: cut by ids, prefilled once, computed as if whole."""

from __future__ import annotations

import io

import pytest
import torch

from stream_engine.engine import GenerateRequest, RowRequest, ScoreRequest
from stream_engine.engine.prefixes import share_prompt, shared_prefix
from stream_engine.errors import RecordError
from stream_engine.models.base import IMAGE_SLOT, Prompt
from stream_engine.records import EncodedImage, PromptDigest
from tests.engine.conftest import picture

QUESTIONS = [
    "Is the cat red? Please answer yes or no.",
    "Is the cat blue? Please answer yes or no.",
    "Is there a dog? Please answer yes or no.",
]


def prompt(*ids: int) -> Prompt:
    return Prompt(list(ids), PromptDigest("", "", ""), vision="pixels")


@pytest.mark.parametrize(
    ("ids", "prefix", "suffixes"),
    [
        pytest.param([(1, 2, 3), (1, 2, 4)], [1, 2], [(3,), (4,)], id="last-differs"),
        pytest.param([(1, 9, 9), (1, 2, 4, 5)], [1], [(9, 9), (2, 4, 5)], id="early"),
        pytest.param([(1, 2), (1, 2, 3)], [1], [(2,), (2, 3)], id="one-begins-the-other"),
        pytest.param([(1, 2, 3)], [1, 2], [(3,)], id="a-single-question-keeps-its-last-token"),
        pytest.param([(1, 2), (1, 2)], [1], [(2,), (2,)], id="equal-questions"),
        pytest.param(
            [(1, IMAGE_SLOT, 3, 4), (1, IMAGE_SLOT, 3, 5), (1, IMAGE_SLOT, 2)],
            [1, IMAGE_SLOT],
            [(3, 4), (3, 5), (2,)],
            id="three-with-an-image",
        ),
    ],
)
def test_prompts_are_cut_where_the_first_two_differ(ids, prefix, suffixes):
    shared, rests = shared_prefix([prompt(*row) for row in ids])
    assert shared.ids == prefix
    assert rests == suffixes
    assert shared.vision == "pixels"
    assert shared.next_position == len(prefix)


def test_positions_follow_from_the_whole_prompts():
    """Where an image takes fewer positions than tokens (M-RoPE), the first token after it knows."""
    prompts = [prompt(1, 7, 7, 7, 7, 2, 3), prompt(1, 7, 7, 7, 7, 2, 4)]
    for whole in prompts:
        whole.next_position = 5
    shared, [suffix, _] = shared_prefix(prompts)
    assert shared.next_position + len(suffix) == 5


@pytest.mark.parametrize(
    "ids",
    [
        pytest.param([(1, 2), (3, 4)], id="nothing-in-common"),
        pytest.param([(1, 5, IMAGE_SLOT, 2), (1, 6, IMAGE_SLOT, 2)], id="text-before-the-image"),
        pytest.param([(1, 5, 77, 2), (1, 6, 77, 2)], id="an-image-token-of-the-familys-own"),
        pytest.param([(1,)], id="a-single-token"),
    ],
)
def test_what_cannot_be_shared_is_refused(ids):
    with pytest.raises(RecordError, match="no_shared_prefix"):
        shared_prefix([prompt(*row) for row in ids], image_ids=(77,))


def test_the_cut_keeps_every_token_in_place(make_engine):
    engine = make_engine()
    images = [picture(3)]
    shared = share_prompt(engine.runner, QUESTIONS, images)
    for question, suffix in zip(QUESTIONS, shared.suffixes):
        assert [*shared.prompt.ids, *suffix] == engine.model.prompt(question, images).ids
    assert shared.prompt.ids.count(IMAGE_SLOT) == engine.model.tokens_per_image


def test_shared_questions_are_answered_as_whole_prompts_are(make_engine):
    """Against a full forward over prompt and question, without any cache."""
    engine = make_engine()
    watched = [5, 17, 400]
    images = [picture(3)]
    shared = share_prompt(engine.runner, QUESTIONS, images)
    [result] = engine.next_token_logps(
        [ScoreRequest("k", shared.prompt, tuple(shared.suffixes))], watched
    )
    assert engine.counters["prompts"] == 1
    engine.model.set_attention("sdpa")
    for question, logps in zip(QUESTIONS, result.logps):
        whole = engine.model.prompt(question, images)
        with torch.no_grad():
            features = engine.model.encode_images([whole])
            hidden = engine.model.prefill([whole], features)
            logits = engine.model.lm_head(hidden)[0, : engine.model.vocab_size].double()
        expected = torch.log_softmax(logits, -1)[watched].tolist()
        assert logps == pytest.approx(expected, abs=1e-4)


def test_replies_over_a_shared_prefix_are_those_of_whole_prompts(make_engine):
    engine = make_engine()
    shared = share_prompt(engine.runner, QUESTIONS, [picture(3)])
    rows = tuple(RowRequest(seed, suffix) for seed, suffix in enumerate(shared.suffixes))
    [together] = engine.generate([GenerateRequest("k", shared.prompt, rows)])
    for seed, (question, row) in enumerate(zip(QUESTIONS, together.rows)):
        whole = engine.model.prompt(question, [picture(3)])
        [alone] = engine.generate([GenerateRequest("k", whole, (RowRequest(seed),))])
        assert row.token_ids == alone.rows[0].token_ids
        assert row.token_logps == pytest.approx(alone.rows[0].token_logps, abs=1e-4)


def test_a_question_too_long_is_refused_alone(make_engine):
    engine = make_engine()
    shared = share_prompt(engine.runner, [QUESTIONS[0], "x" * 2000, QUESTIONS[1]], [])
    kinds = [getattr(suffix, "reason", "asked") for suffix in shared.suffixes]
    assert kinds == ["asked", "prompt_too_long", "asked"]


def test_a_request_without_continuations_has_an_empty_result(make_engine):
    engine = make_engine()
    whole = engine.model.prompt("what?", [])
    [result] = engine.next_token_logps([ScoreRequest("k", whole, ())], [5])
    assert result.logps == []


def test_prepared_questions_come_back_by_key(make_engine):
    engine = make_engine()
    buffer = io.BytesIO()
    picture(1).save(buffer, "PNG")
    good, broken = EncodedImage(buffer.getvalue()), EncodedImage(b"no picture")
    asked = [("a", QUESTIONS, (good,)), ("b", QUESTIONS, (broken,)), ("c", QUESTIONS[:1], ())]
    prepared = dict(engine.prepare_shared(asked))
    assert len(prepared["a"].suffixes) == 3
    assert prepared["b"].reason == "undecodable_image"
    assert len(prepared["c"].suffixes) == 1
