"""Generation: log-probs are the model's own, and the schedule does not shape the answers."""

from __future__ import annotations

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from stream_engine.engine import GenerateRequest, Generation, RequestFailure, RowRequest
from stream_engine.engine.draw import penalize, seen_in
from stream_engine.errors import RecordError
from tests.engine.conftest import ask, drawn, full_forward_logps, scored


def test_logps_equal_a_full_forward(make_engine):
    engine = make_engine()
    requests = ask(engine, 6)
    results = {r.key: r for r in engine.generate(requests)}
    assert len(results) == 6
    for request in requests:
        for row in results[request.key].rows:
            ids, logps = scored(row)
            expected = full_forward_logps(engine, request.prompt, ids)
            assert sum(logps) == pytest.approx(sum(expected), abs=1e-4)
            assert logps == pytest.approx(expected, abs=2e-5)


def test_another_schedule_draws_the_same_tokens(make_engine):
    plenty, scarce = make_engine(), make_engine(max_rows=3, max_tokens=70)
    one = drawn(plenty.generate(ask(plenty, 7)))
    other = drawn(scarce.generate(reversed(ask(scarce, 7))))
    assert one == other
    assert len({tuple(row) for rows in one.values() for row in rows}) > 20


def test_answer_j_does_not_depend_on_how_many_are_drawn(make_engine):
    engine = make_engine()
    few, many = (
        drawn(engine.generate(ask(engine, 3, rows=2))),
        drawn(engine.generate(ask(engine, 3, rows=6))),
    )
    for key, rows in few.items():
        assert many[key][:2] == rows


def test_another_seed_draws_other_tokens(make_engine):
    engine = make_engine()
    assert drawn(engine.generate(ask(engine, 3, seed=0))) != drawn(
        engine.generate(ask(engine, 3, seed=1))
    )


def test_rows_go_on_from_prompts_of_their_own(make_engine):
    """A shared prefix with per-row suffixes equals asking each whole prompt alone."""
    engine = make_engine(temperature=0.0)
    request = ask(engine, 1)[0]
    suffixes = [(), (7, 8, 9), (11,), (5, 6)]
    rows = tuple(RowRequest(0, suffix) for suffix in suffixes)
    together = next(iter(engine.generate([GenerateRequest("k", request.prompt, rows)])))
    for suffix, row in zip(suffixes, together.rows):
        ids, logps = scored(row)
        expected = full_forward_logps(engine, request.prompt, [*suffix, *ids])[len(suffix) :]
        assert logps == pytest.approx(expected, abs=2e-5)


def test_image_is_encoded_and_prompt_prefilled_once_a_question(make_engine):
    engine = make_engine()
    encoded = []
    engine.model.tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    requests = ask(engine, 6, rows=5)
    list(engine.generate(requests))
    assert sum(encoded) == 4  # questions 0, 1, 3, 4 have an image
    assert engine.counters["prompts"] == 6
    assert engine.counters["prompt_tokens"] == sum(len(r.prompt) for r in requests)


def test_language_model_sees_each_answer_token_once(make_engine):
    engine = make_engine(max_new_tokens=6)
    seen = []
    engine.model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"].shape[1]), with_kwargs=True
    )
    requests = ask(engine, 2, rows=3)
    results = list(engine.generate(requests))
    prompts = sum(len(r.prompt) for r in requests)
    # the last token of an answer is drawn but never fed; an end token neither
    fed = sum(len(row.token_ids) - (row.end_token_id is None) for r in results for row in r.rows)
    assert sum(seen) == prompts + fed


def test_decode_batch_stays_full_while_questions_wait(make_engine):
    engine = make_engine(max_rows=8, max_new_tokens=16)
    engine.runner.stop_token_ids = frozenset(range(0, 480, 12))  # ragged lengths
    results = list(engine.generate(ask(engine, 30, rows=4)))
    assert len({len(row.token_ids) for r in results for row in r.rows}) > 5
    occupancy = engine.counters["decode_tokens"] / engine.counters["decode_capacity"]
    assert occupancy > 0.92


def test_max_new_tokens_ends_a_row_without_end_token(make_engine):
    engine = make_engine(max_new_tokens=3)
    engine.runner.stop_token_ids = frozenset()
    for result in engine.generate(ask(engine, 2)):
        for row in result.rows:
            assert len(row.token_ids) == len(row.token_logps) == 3
            assert (row.finish_reason, row.end_token_id, row.end_logp) == ("length", None, None)


def test_no_row_goes_beyond_the_models_last_position(make_engine):
    """Its own prompt tokens count as those of the shared prompt do."""
    engine = make_engine(max_new_tokens=20)
    engine.runner.stop_token_ids = frozenset()
    prompt = ask(engine, 1)[0].prompt
    engine.runner.max_positions = len(prompt) + 9
    rows = tuple(RowRequest(seed, suffix) for seed, suffix in enumerate([(), (7, 8, 9), (5,)]))
    (result,) = engine.generate([GenerateRequest("k", prompt, rows)])
    assert [len(row.token_ids) for row in result.rows] == [9, 6, 8]


def test_stop_token_is_kept_apart_with_its_logp(make_engine):
    engine = make_engine(temperature=0.0)
    request = ask(engine, 1, rows=1)[0]
    free = next(iter(engine.generate([request]))).rows[0]
    engine.runner.stop_token_ids = frozenset({free.token_ids[2]})
    stopped = next(iter(engine.generate([request]))).rows[0]
    place = free.token_ids.index(free.token_ids[2])
    assert stopped.token_ids == free.token_ids[:place]
    assert stopped.finish_reason == "stop"
    assert stopped.end_token_id == free.token_ids[2]
    assert stopped.end_logp == pytest.approx(free.token_logps[place], abs=1e-6)


def test_suppressed_tokens_are_never_drawn(make_engine):
    engine = make_engine(temperature=0.0, max_new_tokens=1)
    request = ask(engine, 1, rows=1)[0]
    likeliest = next(iter(engine.generate([request]))).rows[0].token_ids[0]
    engine.runner.suppressed = torch.tensor([likeliest])
    assert next(iter(engine.generate([request]))).rows[0].token_ids[0] != likeliest


def test_repetition_penalty_equals_transformers():
    logits = torch.randn(2, 9, generator=torch.Generator().manual_seed(0))
    seen = [[1, 4, 4], []]
    penalized = penalize(logits, seen_in(seen, logits), 1.3)
    processor = RepetitionPenaltyLogitsProcessor(1.3)
    assert torch.equal(penalized[:1], processor(torch.tensor([seen[0]]), logits[:1].clone()))
    assert torch.equal(penalized[1], logits[1])


def test_out_of_memory_halves_the_budget_and_loses_nothing(make_engine):
    """CPU memory cannot be made to run out politely, so the backbone raises torch's own error."""
    calm, pressed = make_engine(max_rows=16), make_engine(max_rows=16)
    expected = drawn(calm.generate(ask(calm, 6)))
    too_many = 5

    def refuse(module, args, kwargs):
        if 8 < kwargs["inputs_embeds"].shape[1] < 20:  # a decode step of more than 8 rows
            raise torch.OutOfMemoryError("CUDA out of memory")

    pressed.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    assert drawn(pressed.generate(ask(pressed, 6))) == expected
    assert pressed.runner.budget.scale < 1.0
    assert pressed.runner.budget.rows <= 8 < too_many * 4


def test_a_question_that_never_fits_fails_by_name(make_engine):
    engine = make_engine(max_rows=2, max_tokens=256)

    def refuse(module, args, kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    results = list(engine.generate(ask(engine, 2)))
    assert {r.reason for r in results} == {"out_of_memory"}
    assert {r.key for r in results} == {"0", "1"}


def test_memory_that_runs_out_where_requests_are_made_is_not_the_devices(make_engine):
    """It was taken for the device's: the budget was halved, and as a generator that has raised
    looks exhausted, the remaining requests were lost without a word."""
    engine = make_engine()

    def source():
        yield from ask(engine, 2)
        raise MemoryError("a picture of 16000 x 16000")

    with pytest.raises(MemoryError, match="16000"):
        list(engine.generate(source()))
    assert engine.runner.budget.scale == 1.0
    assert not engine.runner.is_busy, "its spans in the cache were not released"
    assert len(drawn(engine.generate(ask(engine, 4)))) == 4


@pytest.mark.parametrize("alone_only", [False, True], ids=["at-once", "after-another-error"])
def test_memory_that_runs_out_in_a_prefill_loses_no_question(make_engine, alone_only):
    """Host memory lost the whole batch, and one of a failed batch's questions those after it."""
    engine = make_engine()
    expected = drawn(engine.generate(ask(engine, 5)))
    prefill, calls = engine.runner.prefill, []

    def fail(prompts, starts):
        calls.append(len(prompts))
        if alone_only and len(prompts) > 1 and len(calls) == 1:
            raise ValueError("a bad one among them")
        if len(calls) == (3 if alone_only else 1):
            raise MemoryError
        return prefill(prompts, starts)

    engine.runner.prefill = fail
    assert drawn(engine.generate(ask(engine, 5))) == expected
    assert len(calls) > 3 or not alone_only


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory")]
)
@pytest.mark.parametrize("shared", [False, True])
def test_a_record_that_does_not_fit_the_hosts_memory_is_set_aside_alone(
    make_engine, monkeypatch, error, shared
):
    """It once ended the prompts of the whole shard."""
    engine = make_engine()
    prompt = engine.model.prompt

    def hungry(question, images):
        if question == "huge":
            raise error
        return prompt(question, images)

    monkeypatch.setattr(engine.model, "prompt", hungry)
    texts = ["small", "huge", "small too"]
    if shared:
        prepared = dict(engine.prepare_shared((text, [text], []) for text in texts))
    else:
        prepared = dict(engine.prepare((text, text, []) for text in texts))
    assert list(prepared) == texts
    assert [isinstance(made, RecordError) for made in prepared.values()] == [False, True, False]
    assert prepared["huge"].reason == "out_of_host_memory"


def test_nan_fails_only_the_question_that_has_it(make_engine):
    engine = make_engine()
    expected = drawn(engine.generate(ask(engine, 4)))
    requests = ask(engine, 4)
    requests[1].prompt.vision[0][:] = float("nan")
    results = {r.key: r for r in engine.generate(requests)}
    failure = results.pop("1")
    assert isinstance(failure, RequestFailure)
    assert failure.reason == "nonfinite_logits"
    assert drawn(results.values()) == {k: v for k, v in expected.items() if k != "1"}


def test_nan_in_every_row_is_a_failure_too(make_engine):
    """An index of no rows was a float tensor, and the IndexError failed the whole shard."""
    engine = make_engine()
    requests = ask(engine, 1)
    requests[0].prompt.vision[0][:] = float("nan")
    [failure] = engine.generate(requests)
    assert isinstance(failure, RequestFailure) and failure.reason == "nonfinite_logits"


def test_a_prompt_that_breaks_the_forward_fails_alone(make_engine):
    engine = make_engine()
    requests = ask(engine, 3)
    requests[0].prompt.ids[3] = 10**6  # beyond the embedding table
    results = {r.key: r for r in engine.generate(requests)}
    assert isinstance(results["0"], RequestFailure)
    assert results["0"].reason == "forward_error"
    assert isinstance(results["1"], Generation)
    assert isinstance(results["2"], Generation)


def test_a_lost_device_fails_the_call_and_not_its_requests(make_engine):
    """Each request of this call and of all later ones failed alone, with the same error."""
    engine = make_engine()

    def refuse(module, args, kwargs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    engine.model.backbone.register_forward_pre_hook(refuse, with_kwargs=True)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        list(engine.generate(ask(engine, 3)))


def test_a_prompt_longer_than_the_model_is_refused(make_engine):
    engine = make_engine()
    engine.runner.max_positions = 40
    requests = ask(engine, 4)
    results = {r.key: r for r in engine.generate(requests)}
    refused = [r for r in results.values() if isinstance(r, RequestFailure)]
    assert refused
    assert {r.reason for r in refused} == {"prompt_too_long"}


def test_a_slot_forgets_the_answer_before(make_engine):
    """A repetition penalty falls on a row's own tokens, not on those of who had its slot."""
    alone, reused = (make_engine(max_rows=2, repetition_penalty=1.5) for _ in range(2))
    expected = {}
    for request in ask(alone, 6, rows=2):
        expected |= drawn(alone.generate([request]))
        alone.runner.cache.clear()
        alone.runner.seen.marks.zero_()
    assert drawn(reused.generate(ask(reused, 6, rows=2))) == expected
    assert len(reused.runner.seen.marks) < 12
