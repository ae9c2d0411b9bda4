"""Step `trace`: what a profiler sees of five decode steps and of scoring, and a table of each."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from stream_engine.engine import Engine, ScoreRequest
from tests.gpu.models import SMALL, Sizes, build, questions, synchronize
from tests.gpu.step import Kit

STEPS = 5
LINES = 10
MOST_BYTES = 16 << 20


def run(kit: Kit) -> None:
    kit.part("where_time_goes", lambda: trace(kit), needs_s=20)


def trace(kit: Kit) -> dict[str, Any]:
    """Profile both; the trace itself is OUT/trace.json.gz."""
    name, sizes = ("tiny", SMALL) if kit.rehearse else ("llava-7b", Sizes(rows=(80,)))
    engine = build(kit, name, sizes)
    rows = max(sizes.rows)
    asked = questions(engine, rows // sizes.k, sizes.k, STEPS + 1)
    answers = tuple(tuple(range(3, 3 + sizes.tokens)) for _ in range(sizes.k))
    scored = [ScoreRequest("0", engine.model.question(0), answers)]
    list(engine.generate(asked))  # captures, warms up
    list(engine.score(scored))
    mark_decoding(engine)
    activities = [ProfilerActivity.CPU, *([] if kit.rehearse else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as profiler:
        list(engine.generate(asked))
        synchronize()
        with record_function("scoring"):
            list(engine.score(scored))
            synchronize()
    path = kit.out / "trace.json.gz"
    profiler.export_chrome_trace(str(path))
    if path.stat().st_size > MOST_BYTES:
        path.unlink()
    events = profiler.events()
    return {title: table(events, title, kit.device) for title in ("decode_steps", "scoring")} | {
        "trace": path.name if path.exists() else f"larger than {MOST_BYTES} bytes",
        "model": name,
        "rows": rows,
    }


def mark_decoding(engine: Engine) -> None:
    """Let the profiler know when captured steps run, and nothing else."""
    run_ahead = engine.decoder.run_ahead

    def marked(*arguments: Any) -> Any:
        synchronize()
        with record_function("decode_steps"):
            result = run_ahead(*arguments)
            synchronize()
        return result

    engine.decoder.run_ahead = marked


def table(events: Any, title: str, device: str) -> dict[str, Any]:
    """The LINES kinds of work that took longest while `title` ran, and how long none did."""
    spans = [e.time_range for e in events if e.name == title and str(e.device_type).endswith("CPU")]
    spent: dict[str, list[float]] = defaultdict(list)
    for event in events:
        on_device = str(event.device_type).endswith("CUDA") == (device == "cuda")
        at = event.time_range.start
        inside = any(span.start <= at <= span.end for span in spans)
        if on_device and inside and event.name != title:
            spent[event.name].append(event.time_range.elapsed_us() / 1e3)
    assert spent, f"nothing ran on {device} in {title}"
    whole_ms = sum(span.elapsed_us() for span in spans) / 1e3
    busy_ms = sum(map(sum, spent.values()))
    ranked = sorted(spent.items(), key=lambda item: -sum(item[1]))[:LINES]
    lines = [
        f"{sum(each):9.3f} ms {sum(each) / whole_ms:5.1%} {len(each):5d} x {name[:90]}"
        for name, each in ranked
    ]
    print(title, *lines, sep="\n")
    return {"ms": round(whole_ms, 3), "busy": round(busy_ms / whole_ms, 3), "table": lines}
