"""The memory plan: its numbers are those of the real cache and forward, and shape no answer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_kernels.cpu import extend_attention
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stream_engine.engine import Engine
from stream_engine.engine.attention_steps import ExtendStep, PrefillStep, active
from stream_engine.engine.host_memory import host_available
from stream_engine.engine.memory import (
    Demand,
    LanguageShape,
    grown_slot_tokens,
    grown_slots,
    language_shape,
    plan_memory,
    share_out,
    wanted_bytes,
)
from stream_engine.engine.prefix_cache import KVCache
from stream_engine.engine.rehearsal import rehearse
from stream_engine.errors import ConfigError
from tests.engine.conftest import ask

GIB = 1 << 30
LLAVA_7B = LanguageShape(
    layers=32,
    hidden=4096,
    intermediate=11008,
    heads=32,
    kv_heads=32,
    head_dim=128,
    vocab=32000,
    itemsize=2,
)
LLAVA_7B_WEIGHTS = 14_100_000_000


def demand(**changes: Any) -> Demand:
    """LLaVA-1.5-7B that draws ten answers of 128 tokens a question, on a GPU."""
    values: dict[str, Any] = {
        "shape": LLAVA_7B,
        "kv_bytes": LLAVA_7B.kv_bytes,
        "rows": 4096,
        "tokens": 16384,
        "slot_tokens": 136,
        "prompt_tokens": 640,
        "rows_per_question": 10,
        "device": "cuda",
        "grows": False,
        "graphs": False,
    }
    return Demand(**(values | changes))


def shape_of(engine: Engine) -> LanguageShape:
    return language_shape(
        engine.model.backbone.config, itemsize=4, vocab=engine.model.lm_head.weight.shape[0]
    )


# -- the numbers are real --------------------------------------------------------------------------


def test_a_token_costs_what_the_cache_allocates_for_it(make_engine):
    engine = make_engine()
    cache, kv_bytes = engine.runner.cache, shape_of(engine).kv_bytes
    list(engine.generate(ask(engine, 3)))
    assert kv_bytes == engine.planner.bytes_per_token == cache.bytes_per_token
    tokens = cache.spans.capacity + cache.num_slots * cache.slot_capacity
    assert cache.num_bytes == tokens * kv_bytes


def test_a_llava_7b_token_costs_half_a_mebibyte():
    assert LLAVA_7B.kv_bytes == 512 << 10


@pytest.mark.parametrize("rows", [1, 8, 9, 100, 160, 333])
def test_a_growing_cache_has_the_slots_that_are_counted(rows):
    cache = KVCache(max_prefix_tokens=0)
    for _ in range(rows):
        cache.allocate_slot()
    assert grown_slots(rows) == cache.num_slots


@pytest.mark.parametrize("tokens", [1, 32, 33, 200, 257, 520, 1032])
def test_a_growing_slot_has_the_tokens_that_are_counted(tokens):
    cache = KVCache(max_prefix_tokens=0)
    for length in range(1, tokens + 1):
        cache.reserve_slot_tokens(length)
    assert grown_slot_tokens(tokens) == cache.slot_capacity


def test_slabs_allocated_ahead_are_the_plans(make_engine):
    engine = make_engine()
    plan = plan_memory(replace(engine.planner.demand(), rows=20, grows=False), 1 << 30)
    engine.planner._preallocate(plan)
    rehearse(engine.runner, engine.decoder, plan)
    assert engine.runner.cache.num_bytes == plan.slots + plan.prefixes


class Peak(TorchDispatchMode):
    """Counts the bytes of tensors that live at once, `resident` storages apart."""

    def __init__(self, resident: set[int]) -> None:
        super().__init__()
        self.resident, self.live, self.peak = resident, {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and not tensor.is_mkldnn:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.resident:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {k: held for k, held in self.live.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


@torch.no_grad()
@pytest.mark.parametrize("scores", [False, True], ids=["prefill", "suffixes"])
def test_a_forward_peaks_below_its_activations(make_engine, scores, monkeypatch):
    # a GPU's form, which memory is planned for; the compiled one of a processor needs less
    monkeypatch.setattr(extend_attention, "serves", lambda *_: False)
    engine, length = make_engine(), 32
    cache, model, shape = engine.runner.cache, engine.model, shape_of(engine)
    spans = [(cache.allocate_span(length), length) for _ in range(16)]
    ids = torch.arange(16 * length) % 400
    positions = torch.arange(length).repeat(16)
    with active(PrefillStep(cache, spans)):
        model.forward(model.embed(ids), positions)
    slabs = {
        getattr(s, f"{part}_{kind}").untyped_storage().data_ptr()
        for s in cache.layers.values()
        for part in ("prefix", "suffix")
        for kind in ("key", "value")
    }
    step: Any = PrefillStep(cache, spans)
    limit = shape.bytes_per_activation
    if scores:
        step = ExtendStep(cache, [(span, [length]) for span in spans])
        limit += shape.bytes_per_suffix
    with Peak(slabs) as counted, active(step):
        model.forward(model.embed(ids), positions)
    assert 0.4 * limit < counted.peak / len(ids) <= limit


# -- the plan --------------------------------------------------------------------------------------


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("grows", [False, True])
@pytest.mark.parametrize("k", [1, 10, 64])
def test_more_memory_never_means_fewer_rows(graphs, grows, k):
    asked = demand(graphs=graphs, grows=grows, rows_per_question=k)
    before = 0
    for hundredth in range(300, 16000, 50):
        plan = plan_memory(asked, hundredth * GIB // 100)
        assert plan.total <= plan.available
        assert plan.rows >= before
        before = plan.rows
    assert before > 250


def test_one_row_more_does_not_fit():
    plan = plan_memory(demand(), 60 * GIB)
    assert plan.bottleneck == "slots"
    per_row = (136 + 64) * LLAVA_7B.kv_bytes
    assert plan.available - plan.total < 11 * per_row  # the row may begin a question


def test_bounds_hold_where_memory_abounds():
    plan = plan_memory(demand(rows=320), 1000 * GIB)
    assert (plan.rows, plan.prefill_tokens, plan.bottleneck) == (320, 16384, "max_rows")
    assert plan.slots == 321 * 136 * LLAVA_7B.kv_bytes


def test_below_one_question_says_what_is_short():
    plan = plan_memory(demand(), GIB)
    assert 1 <= plan.rows < 10
    assert plan.prefill_tokens == 640
    assert "below the 10 answers of one question" in plan.line()
    assert f"limited by {plan.bottleneck}" in plan.line()


def test_prefills_shrink_before_a_question_is_split():
    shared_prefix = demand(rows_per_question=64)
    plan = plan_memory(shared_prefix, 5 * GIB)
    assert plan.prefill_tokens == 640  # a quarter of it all would be three times that
    assert 50 < plan.rows < 64
    enough = plan_memory(shared_prefix, 6 * GIB)
    assert (enough.rows, enough.prefill_tokens > 2000) == (64, True)


@pytest.mark.parametrize(
    ("changes", "part", "remedy"),
    [
        pytest.param({"slot_tokens": 8000}, "slots", "--max_new_tokens 8000", id="slots"),
        pytest.param({"prompt_tokens": 8000}, "prefixes", "--tensor_parallel", id="prefixes"),
        pytest.param({"rows": 0, "prompt_tokens": 8000}, "prefixes", "--offload", id="scoring"),
        pytest.param(
            {"kv_bytes": 4096, "prompt_tokens": 8000}, "activations", "--offload", id="activations"
        ),
    ],
)
def test_what_never_fits_is_refused_with_a_remedy(changes, part, remedy):
    with pytest.raises(ConfigError, match=remedy) as error:
        plan_memory(demand(**changes), GIB)
    assert f"1.1 GB are free; {part} take most" in str(error.value)


def test_two_llava_7b_fill_a_large_card_and_no_more():
    """139 GiB, both resident: the sampler gets about a thousand rows, the scorer all it asks."""
    card = 139 * GIB
    asked = [demand(), demand(rows=0)]
    left = card - 2 * LLAVA_7B_WEIGHTS
    parts = share_out(left, [wanted_bytes(one) for one in asked])
    sampler, scorer = (plan_memory(one, part) for one, part in zip(asked, parts))
    assert 800 <= sampler.rows <= 1100
    assert scorer.prefill_tokens == 16384
    assert 2 * LLAVA_7B_WEIGHTS + sampler.total + scorer.total <= card
    # A prompt a row, instead of one that ten rows share, would leave a third of that.
    unshared = plan_memory(demand(rows_per_question=1), parts[0])
    assert unshared.rows < sampler.rows / 3


def test_small_wants_are_met_and_large_ones_share_the_rest():
    assert share_out(100, [10, 1000, 1000]) == [10, 45, 45]
    assert share_out(100, [1000, 10, 20]) == [70, 10, 20]
    assert share_out(100, [10, 20]) == [45, 55]
    assert sum(share_out(7, [100, 100])) <= 7


def test_wants_are_enough_for_the_bounds():
    for asked in (demand(rows=320), demand(rows=320, graphs=True), demand(rows=0)):
        plan = plan_memory(asked, wanted_bytes(asked))
        assert (plan.rows, plan.prefill_tokens) == (asked.rows, asked.tokens)


# -- the engine follows it -------------------------------------------------------------------------


# -- rehearsal, as on an accelerator ---------------------------------------------------------------


# -- what is free ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "files"),
    [
        pytest.param(
            "0::/box/inner",
            {
                "box/memory.max": "3000000",
                "box/memory.current": "2500000",
                "box/memory.stat": "anon 1\ninactive_file 300000\nactive_file 200000",
                "box/inner/memory.max": "max",
                "box/inner/memory.current": "1",
            },
            id="v2-limit-of-a-parent",
        ),
        pytest.param(
            "4:cpu,memory:/box",
            {
                "memory/box/memory.limit_in_bytes": "3000000",
                "memory/box/memory.usage_in_bytes": "2500000",
                "memory/box/memory.stat": "total_inactive_file 500000",
            },
            id="v1",
        ),
    ],
)
def test_a_control_groups_limit_counts(tmp_path: Path, line: str, files: dict[str, str]) -> None:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    assert host_available(proc, cgroups) == 4000 << 10
    (proc / "self/cgroup").write_text(f"1:name=systemd:/\n{line}\n")
    for name, text in files.items():
        (cgroups / name).parent.mkdir(parents=True, exist_ok=True)
        (cgroups / name).write_text(text + "\n")
    assert host_available(proc, cgroups) == 1_000_000
    assert host_available(proc, cgroups, share=4) == 250_000
