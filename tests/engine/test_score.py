"""Scoring over one shared prefix equals full forwards, and depends on the image."""

from __future__ import annotations

import pytest
import torch

from stream_engine.engine import RequestFailure, ScoreRequest
from tests.engine.conftest import ask, full_forward_logps, picture


def answers(count: int, vocab: int = 480) -> tuple[tuple[int, ...], ...]:
    generator = torch.Generator().manual_seed(count)
    return tuple(
        tuple(torch.randint(3, vocab, (1 + 3 * i,), generator=generator).tolist())
        for i in range(count)
    )


def test_shared_prefix_scores_equal_full_forwards(make_engine):
    engine = make_engine()
    requests = [ScoreRequest(r.key, r.prompt, answers(4)) for r in ask(engine, 5)]
    results = list(engine.score(requests))
    assert [r.key for r in results] == [r.key for r in requests]
    for request, result in zip(requests, results):
        for answer, logps in zip(request.continuations, result.token_logps):
            expected = full_forward_logps(engine, request.prompt, list(answer))
            assert sum(logps) == pytest.approx(sum(expected), abs=1e-4)
            assert logps == pytest.approx(expected, abs=2e-5)


def test_scores_of_generated_answers_equal_generations_own(make_engine):
    engine = make_engine()
    requests = {r.key: r for r in ask(engine, 5)}
    generated = {r.key: r for r in engine.generate(requests.values())}
    to_score = [
        ScoreRequest(key, r.prompt, tuple(tuple(row.token_ids) for row in generated[key].rows))
        for key, r in requests.items()
    ]
    for result in engine.score(to_score):
        for row, logps in zip(generated[result.key].rows, result.token_logps):
            assert logps == pytest.approx(row.token_logps, abs=2e-5)


def test_score_changes_when_the_image_is_swapped(make_engine):
    engine = make_engine()
    one, other = (
        ScoreRequest("k", engine.model.prompt("what?", [picture(n)]), answers(2)) for n in (1, 2)
    )
    first, second = next(engine.score([one])), next(engine.score([other]))
    assert one.prompt.digest.ids == other.prompt.digest.ids
    assert one.prompt.digest.pixels != other.prompt.digest.pixels
    assert abs(sum(first.token_logps[1]) - sum(second.token_logps[1])) > 1e-3


@pytest.mark.parametrize("max_tokens", [40, 90, 4096])
def test_small_batches_score_the_same(make_engine, max_tokens):
    engine, reference = make_engine(max_tokens=max_tokens), make_engine()
    requests = [ScoreRequest(r.key, r.prompt, answers(5)) for r in ask(engine, 4)]
    for got, expected in zip(engine.score(requests), reference.score(requests)):
        for a, b in zip(got.token_logps, expected.token_logps):
            assert a == pytest.approx(b, abs=2e-5)


def test_only_prompt_and_suffix_tokens_are_run(make_engine):
    engine = make_engine()
    seen = []
    engine.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    prompt = ask(engine, 1)[0].prompt
    given = tuple(tuple(range(5, 5 + 7)) for _ in range(4))
    list(engine.score([ScoreRequest("k", prompt, given)]))
    assert sum(seen) == len(prompt) + 4 * (7 - 1)
    assert engine.counters["head_rows"] == 4 * 7


def test_next_token_logps_equal_full_forwards(make_engine):
    engine = make_engine()
    watched = [5, 17, 400]
    requests = [ScoreRequest(r.key, r.prompt, answers(3)) for r in ask(engine, 3)]
    for request, result in zip(requests, engine.next_token_logps(requests, watched)):
        for continuation, logps in zip(request.continuations, result.logps):
            for token, logp in zip(watched, logps):
                full = full_forward_logps(engine, request.prompt, [*continuation, token])
                assert logp == pytest.approx(full[-1], abs=2e-5)


def test_out_of_memory_scores_in_smaller_batches(make_engine):
    engine, reference = make_engine(), make_engine()
    requests = [ScoreRequest(r.key, r.prompt, answers(4)) for r in ask(engine, 6)]
    expected = [r.token_logps for r in reference.score(requests)]
    engine.runner.budget.max_tokens = 1000

    def refuse(module, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] > 260:
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    got = [r.token_logps for r in engine.score(requests)]
    assert engine.runner.budget.scale < 1.0
    for one, other in zip(got, expected):
        for a, b in zip(one, other):
            assert a == pytest.approx(b, abs=2e-5)


def test_a_request_that_breaks_fails_alone(make_engine):
    engine = make_engine()
    requests = [ScoreRequest(r.key, r.prompt, answers(2)) for r in ask(engine, 3)]
    requests[1].prompt.ids[2] = 10**6
    results = list(engine.score(requests))
    assert [isinstance(r, RequestFailure) for r in results] == [False, True, False]
    assert results[1].reason == "forward_error"


def test_a_lost_device_fails_the_call_and_not_its_requests(make_engine):
    """Each request of this call and of all later ones failed alone, with the same error."""
    engine = make_engine()
    requests = [ScoreRequest(r.key, r.prompt, answers(2)) for r in ask(engine, 3)]

    def refuse(module, args, kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(engine.score(requests))


def test_a_question_without_scorable_answers_gets_an_empty_result(make_engine):
    engine = make_engine()
    prompt = ask(engine, 1)[0].prompt
    assert next(engine.score([ScoreRequest("k", prompt, ())])).token_logps == []


def test_requests_that_end_in_an_error_leave_nothing_in_the_cache(make_engine):
    """The spans of a batch that was being put together stayed taken for good."""
    engine = make_engine()

    def requests():
        for request in ask(engine, 2):
            yield ScoreRequest(request.key, request.prompt, ((5, 6), (7,)))
        raise ValueError("the pictures ran out")

    with pytest.raises(ValueError, match="ran out"):
        list(engine.score(requests()))
    assert not engine.runner.is_busy
