"""Steps recorded once and replayed, as CUDA graphs are: they draw what eager steps draw."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from stream_engine.engine.decode import GraphDecoder
from tests.engine.conftest import ask, drawn, scored


@pytest.mark.parametrize("penalty", [1.0, 1.3], ids=["", "penalty"])
def test_steps_that_feed_themselves_draw_the_same_tokens(make_engine, penalty):
    """What a CUDA graph replays, run without the graph: static buffers, spare rows, late reads."""
    plain, static = (make_engine(max_rows=10, repetition_penalty=penalty) for _ in range(2))
    for engine in (plain, static):
        engine.runner.stop_token_ids = frozenset(range(0, 480, 9))
    static.runner.cache.preallocate(prefix_tokens=2000, slots=11, slot_tokens=24)
    static.decoder.capture_with(GraphDecoder(static.runner))
    expected = {r.key: r for r in plain.generate(ask(plain, 9, rows=3))}
    got = {r.key: r for r in static.generate(ask(static, 9, rows=3))}
    assert drawn(got.values()) == drawn(expected.values())
    for key, result in got.items():
        for row, other in zip(result.rows, expected[key].rows):
            assert scored(row)[1] == pytest.approx(scored(other)[1], abs=2e-5)
    assert static.decoder.graphs.graphs


class FixedAddresses:
    """Stands for CUDA's capture: a replay reads and writes the slabs that were there when it was
    recorded, whatever the cache has become since."""

    def __init__(self, engine) -> None:
        self.engine = engine
        self.num_captures = 0

    def renew_pool(self) -> None:
        pass

    def slabs(self) -> list[tuple[int, tuple[int, ...]]]:
        layers = self.engine.runner.cache.layers.values()
        tensors = [t for s in layers for t in (s.prefix_key, s.suffix_key)]
        if self.engine.runner.seen is not None:
            tensors.append(self.engine.runner.seen.marks)
        return [(tensor.data_ptr(), tuple(tensor.shape)) for tensor in tensors]

    def capture(self, warm_up, step):
        cache = self.engine.runner.cache
        for layer, slab in list(cache.layers.items()):  # as a warm-up's first forward lets them
            cache.store(layer, slab.prefix_key[None, :, :1])
        self.num_captures += 1
        recorded = self.slabs()

        def replay() -> None:
            assert self.slabs() == recorded
            slab = cache.layers[0]
            assert slab.prefix_key.shape[1] == cache.spans.capacity
            assert slab.suffix_key.shape[0] == cache.num_slots
            assert slab.suffix_key.shape[2] == cache.slot_capacity
            step()

        return SimpleNamespace(replay=replay)


@pytest.mark.parametrize("penalty", [1.0, 1.3], ids=["", "penalty"])
def test_no_step_is_replayed_over_slabs_that_have_grown(make_engine, penalty):
    """Longer rows and more slots than were planned: a replay would have written past the slab."""
    values = {"max_rows": 6, "max_new_tokens": 40, "repetition_penalty": penalty}
    plain, static = (make_engine(**values) for _ in range(2))
    static.decoder.capture_with(GraphDecoder(static.runner))
    static.decoder.graphs.site = site = FixedAddresses(static)

    def requests(engine):
        short, long = ask(engine, 4, rows=2), ask(engine, 8, rows=2)[4:]
        own = tuple(range(5, 15))  # with an answer more than a slot holds at first
        rows = [tuple(replace(row, suffix_ids=own) for row in r.rows) for r in long]
        return [*short, *(replace(r, rows=own_rows) for r, own_rows in zip(long, rows))]

    assert drawn(static.generate(requests(static))) == drawn(plain.generate(requests(plain)))
    assert site.num_captures > 1


class ShortOfMemory(FixedAddresses):
    """Memory runs out while a step is recorded; what is seen is that the capture came to no end."""

    def capture(self, warm_up, step):
        if self.engine.runner.budget.rows > 4:
            try:
                raise torch.OutOfMemoryError("CUDA out of memory")
            finally:
                raise RuntimeError("CUDA error: operation failed due to a previous error")
        return super().capture(warm_up, step)


def test_memory_that_runs_out_in_a_capture_halves_the_batch(make_engine):
    """It was taken for a step that cannot be captured, and all further ones ran eagerly."""
    plain, static = make_engine(max_rows=8), make_engine(max_rows=8)
    static.decoder.capture_with(GraphDecoder(static.runner))
    static.decoder.graphs.site = site = ShortOfMemory(static)
    assert drawn(static.generate(ask(static, 5))) == drawn(plain.generate(ask(plain, 5)))
    assert static.runner.budget.rows == 4
    assert static.decoder.graphs is not None and site.num_captures > 0
