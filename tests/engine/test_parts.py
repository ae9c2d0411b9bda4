"""The engine's small parts: spans, budgets, resolved sampling, seeds, the self-test."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from PIL import ExifTags, Image

from stream_engine.config import SamplingConfig
from stream_engine.device_errors import (
    hidden_out_of_memory,
    is_device_lost,
    is_out_of_memory,
)
from stream_engine.engine import GenerateRequest, resolve_sampling, row_seed
from stream_engine.engine.batching import RECOVERY_STEPS, TokenBudget, map_ahead
from stream_engine.engine.in_flight import RequestQueue
from stream_engine.engine.prefix_cache import CacheFullError, KVCache, SpanAllocator
from stream_engine.engine.selftest import check_model
from stream_engine.errors import CheckpointError, RecordError
from stream_engine.models.base import Prompt
from stream_engine.pictures import decode_image
from stream_engine.records import PromptDigest


def test_released_spans_are_merged_and_used_again():
    spans = SpanAllocator(10)
    starts = [spans.allocate(n) for n in (3, 3, 4)]
    assert starts == [0, 3, 6]
    assert spans.allocate(1) is None
    spans.release(0, 3)
    spans.release(6, 4)
    assert spans.allocate(4) == 6
    spans.release(3, 3)
    assert spans.allocate(6) == 0


def test_slabs_keep_their_contents_when_they_grow():
    cache = KVCache(max_prefix_tokens=100)
    start = cache.allocate_span(4)
    key = torch.randn(1, 2, 4, 8)
    store = cache.store(0, key)
    store.prefix_key[:, start : start + 4] = key[0]
    generation = cache.generation
    cache.allocate_span(50)
    grown = cache.store(0, key)
    assert grown.prefix_key.shape[1] >= 54
    assert torch.equal(grown.prefix_key[:, start : start + 4], key[0])
    assert cache.generation == generation + 1


def test_the_slot_that_padding_is_written_to_is_never_handed_out():
    """After a halved budget had grown again, all preallocated slots were in use, the last too."""
    cache = KVCache(max_prefix_tokens=100)
    cache.num_spare_slots = 1
    cache.preallocate(prefix_tokens=10, slots=5, slot_tokens=4)
    slots = [cache.allocate_slot() for _ in range(4)]
    assert cache.num_slots == 5
    for _ in range(30):
        slots.append(cache.allocate_slot())
        assert max(slots) < cache.num_slots - 1
    assert len(set(slots)) == 34


def test_a_prefix_slab_in_pieces_waits_and_does_not_outgrow_its_limit():
    """It grew by every prompt that found no piece large enough, far beyond what was planned."""
    cache = KVCache(max_prefix_tokens=100)
    starts = [cache.allocate_span(25) for _ in range(4)]
    cache.release_span(starts[0], 25)
    cache.release_span(starts[2], 25)
    with pytest.raises(CacheFullError, match="50 prefix tokens in use, 40 more"):
        cache.allocate_span(40)
    assert cache.spans.capacity == 100
    cache.release_span(starts[1], 25)
    assert cache.allocate_span(40) == 0


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: device-side assert triggered\nFor debugging pass CUDA_LAUNCH_BLOCKING=1",
        "CUDA error: an illegal memory access was encountered",
        "CUDA error: uncorrectable ECC error encountered",
        "CUDA error: unspecified launch failure",
        "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, m, n)`",
        "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
        "Triton Error [CUDA]: an illegal memory access was encountered",
        "HIP error: unspecified launch failure",
    ],
)
def test_an_error_that_every_further_call_gives_means_a_lost_device(text: str):
    assert is_device_lost(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        RuntimeError("CUDA error: invalid configuration argument"),
        RuntimeError("CUDA error: CUBLAS_STATUS_INVALID_VALUE when calling `cublasGemmEx(...)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        RuntimeError("CUDA error: operation not permitted when stream is capturing"),
        RuntimeError("CUDA error: invalid device ordinal"),
        RuntimeError("Triton Error [CUDA]: a PTX JIT compilation failed"),
        ValueError("CUDA error"),
    ],
)
def test_an_error_of_one_call_does_not_mean_a_lost_device(error: Exception):
    assert not is_device_lost(error)
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried ..."),
        MemoryError(),
    ],
)
def test_out_of_memory_goes_by_many_names_and_loses_no_device(error: Exception):
    assert is_out_of_memory(error)
    assert not is_device_lost(error)


def test_out_of_memory_is_found_behind_what_it_caused():
    shortage = torch.OutOfMemoryError("CUDA out of memory")
    after = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    after.__context__ = shortage
    last = ValueError("no graph")
    last.__cause__, shortage.__context__ = after, last  # a circle, as re-raising makes them
    assert hidden_out_of_memory(last) is hidden_out_of_memory(shortage) is shortage
    assert hidden_out_of_memory(ValueError("no graph")) is None


def test_budget_halves_and_recovers():
    budget = TokenBudget(1000, 64)
    budget.halve()
    assert (budget.tokens, budget.rows) == (500, 32)
    for _ in range(3 * RECOVERY_STEPS):
        budget.succeed()
    assert (budget.tokens, budget.rows) == (1000, 64)


def test_requests_that_are_put_back_come_first_and_in_their_order():
    requests = [GenerateRequest(key, Prompt([1], PromptDigest("", "", "")), ()) for key in "abcd"]
    queue = RequestQueue(requests, lambda request: request.key == "c")
    taken = []
    for _ in range(2):
        queue.peek()
        taken.append(queue.pop())
    queue.put_back(taken)
    keys = []
    while queue.peek() is not None:
        keys.append(queue.pop().key)
    assert keys == ["a", "b", "d"]


def test_sampling_is_the_runs_then_the_checkpoints_then_the_default():
    checkpoint = {"top_p": 0.6, "top_k": None, "temperature": 0.9, "max_new_tokens": 64}
    resolved = resolve_sampling(SamplingConfig(top_k=7), checkpoint)
    assert (resolved.temperature, resolved.top_p, resolved.top_k) == (0.7, 0.6, 7)
    assert (resolved.max_new_tokens, resolved.repetition_penalty) == (64, 1.0)
    assert resolved.sources == {
        "temperature": "run",
        "top_p": "checkpoint",
        "top_k": "run",
        "repetition_penalty": "default",
        "max_new_tokens": "checkpoint",
    }


@pytest.mark.parametrize(
    ("stated", "greedy"),
    [
        pytest.param(
            {"do_sample": True, "top_k": 1, "top_p": 0.001, "temperature": 0.01},
            "top_k 1",
            id="qwen2-vl",
        ),
        pytest.param(
            {"do_sample": True, "temperature": 1e-6, "top_k": 3, "top_p": 0.5},
            "temperature 1e-06",
            id="qwen2.5-vl",
        ),
        pytest.param({"top_k": 3, "top_p": 0.001}, "top_p 0.001", id="top-p"),
        pytest.param({"do_sample": False, "top_k": 3, "top_p": 0.5}, "do_sample false", id="flag"),
    ],
)
def test_the_filters_of_a_greedy_file_are_not_inherited_by_a_run_that_draws(stated, greedy):
    """The run's temperature of 0.7 met Qwen2-VL's top_k of 1: all answers to a question equal."""
    stated |= {"repetition_penalty": 1.05}
    resolved = resolve_sampling(SamplingConfig(), stated)
    assert (resolved.top_p, resolved.top_k, resolved.repetition_penalty) == (1.0, 50, 1.05)
    for name in ("top_p", "top_k"):
        assert resolved.sources[name] == f"default (the checkpoint's {greedy} is greedy)"
    assert resolved.sources["repetition_penalty"] == "checkpoint"
    [note] = resolved.notes
    assert f"top_p {stated['top_p']}, top_k {stated['top_k']} (set them" in note


def test_the_filters_of_a_greedy_file_stand_where_the_run_is_greedy_or_sets_them():
    stated = {"top_k": 1, "top_p": 0.001}
    greedy = resolve_sampling(SamplingConfig(temperature=0), stated)
    assert (greedy.top_k, greedy.top_p, greedy.notes) == (1, 0.001, ())
    own = resolve_sampling(SamplingConfig(top_k=1, top_p=0.9), stated)
    assert (own.top_k, own.top_p, own.notes) == (1, 0.9, ())


def test_settings_of_a_checkpoint_that_are_not_supported_are_named():
    """min_p and the like were ignored silently: answers came from another distribution."""
    stated = {"min_p": 0.05, "no_repeat_ngram_size": 3, "bad_words_ids": [[7]]}
    without = {"typical_p": 1.0, "min_length": 0, "suppress_tokens": [], "top_h": None, "min_p": 0}
    [note] = resolve_sampling(SamplingConfig(), without | stated).notes
    assert note.startswith("generation_config.json's bad_words_ids, min_p, no_repeat_ngram_size: ")
    assert resolve_sampling(SamplingConfig(), without).notes == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("top_p", value) for value in ("0.9", 2.0, float("nan"), True)],
        *[("top_k", value) for value in ("50", -2, 1.5)],
        *[("repetition_penalty", value) for value in (0, "x")],
        *[("max_new_tokens", value) for value in (0, float("inf"))],
    ],
)
def test_a_value_that_a_setting_cannot_have_is_refused_by_name(name, value):
    """Answers were drawn from whatever came of it, or each record failed."""
    with pytest.raises(CheckpointError, match=f"{name} is .*, or set --{name}"):
        resolve_sampling(SamplingConfig(), {name: value})


def test_odd_values_that_say_something_are_followed():
    resolved = resolve_sampling(SamplingConfig(), {"top_k": -1, "temperature": "0.7"})
    assert resolved.top_k == 0
    assert resolve_sampling(SamplingConfig(top_p=0.5), {"top_p": "0.9"}).top_p == 0.5


def test_beam_search_of_a_checkpoint_is_refused():
    with pytest.raises(CheckpointError, match="beam"):
        resolve_sampling(SamplingConfig(), {"num_beams": 3})


def test_row_seeds_differ_by_run_sample_and_answer():
    seeds = {row_seed(s, k, j) for s in range(3) for k in ("a", "b") for j in range(5)}
    assert len(seeds) == 30
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "a", 1) == row_seed(0, "a", 1)


def test_map_ahead_keeps_order_and_raises_where_the_item_stands():
    assert list(map_ahead(lambda x: x * x, range(20), threads=3, ahead=5)) == [
        x * x for x in range(20)
    ]
    with pytest.raises(ZeroDivisionError):
        list(map_ahead(lambda x: 1 // x, [1, 0], threads=2, ahead=2))


def test_undecodable_image_is_a_record_error():
    with pytest.raises(RecordError) as caught:
        decode_image(b"\x89PNG not really", "a.png")
    assert caught.value.reason == "undecodable_image"
    assert "a.png" in str(caught.value)


def test_pixels_that_would_turn_white_are_a_record_error():
    buffer = BytesIO()
    Image.new("F", (4, 4), 40_000).save(buffer, "TIFF")
    with pytest.raises(RecordError) as caught:
        decode_image(buffer.getvalue(), "a.png")
    assert caught.value.reason == "unsupported_pixel_depth"


def test_models_see_a_tagged_picture_upright():
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    buffer = BytesIO()
    Image.new("RGB", (8, 4)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "a.png").size == (4, 8)


def test_a_language_model_that_sees_the_future_is_refused(make_engine):
    """A config object shared between models can switch attention to bidirectional silently."""
    engine = make_engine()
    for layer in engine.model.backbone.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(CheckpointError, match="future"):
        check_model(engine)


def test_a_model_of_nans_is_refused(make_engine):
    engine = make_engine()
    engine.model.backbone.norm.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="NaN"):
        check_model(engine)


def test_self_test_reports_how_close_the_shared_prefix_is(make_engine):
    engine = make_engine()
    assert engine.model.shares_prefix
    assert engine.self_test["shared_prefix"] < 1e-5
    assert engine.describe()["attention"] == "shared prefix"
