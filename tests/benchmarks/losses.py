"""What training makes of a run's pairs: losses and selections, by wrong facts per answer.

    python -m tests.benchmarks losses --out tests/benchmarks/results/losses.json [--minutes 4]

The pairs of all three pipelines in the drawn world train its instruct model, 150 steps of 16 pairs;
then its answers to 100 pictures that no run has seen are counted, 5 answers to each (`wrong`, with
its standard error), and those to 300 more (`wrong_more`). A row is kept as soon as it is measured,
and not measured again: stop at any time, and run it again, or several at once. `--minutes` begins
no training after them; `--runs` holds the three runs, made where missing; one that was made with
other settings than today's is refused.
"""

from __future__ import annotations

import argparse
import fcntl
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from stream_engine.demo import checkpoint_path
from stream_engine.demo.facts import count_wrong_facts, read_facts
from stream_engine.demo.loop import RECENT_STEPS, LoopSettings, sampled_answers, train
from stream_engine.demo.tiny_llava import TinyLlava, load_checkpoint
from tests.benchmarks.harness import environment
from tests.benchmarks.selections import SELECTIONS, judged_pairs

RUNS = {
    "dpo_reward": ("dpo_reward",),
    "divide_and_conquer": ("divide_and_conquer",),
    "llava_critic": ("llava_critic",),
    "llava_critic, strict": ("llava_critic", "--strict_follow_rank"),
    "divide_and_conquer, ranked": (
        *("divide_and_conquer", "--fact_pairs", "ranked", "--strict_follow_rank"),
    ),
    "dpo_reward, strict": ("dpo_reward", "--strict_follow_rank"),
}
"""By name, the pipeline of a run, and the flags by which the pairs of its answers are chosen."""
RATES = (1e-4, 3e-4)
SEEDS = (0, 1, 2)
FRESH_SEEDS = (3, 4, 5)
"""By which nothing was chosen: what was, is measured again."""
MORE_PICTURES = 300


class Way(msgspec.Struct, frozen=True):
    """How a row differs from plain DPO over all pairs."""

    loss: str = "sigmoid"
    beta: float = 0.1
    sft: float = 0.0
    """Weight of the chosen answers' likelihood."""
    label_smoothing: float = 0.0
    stop_drop: float | None = None
    selection: str = "all"
    steps: int = 150


WAYS = {
    "sigmoid": Way(),
    "sigmoid + sft": Way(sft=1.0),
    "sft": Way("sft", sft=1.0),
    "apo_zero": Way("apo_zero"),
    "nca_pair": Way("nca_pair"),
    "bco_pair": Way("bco_pair"),
    "ipo": Way("ipo"),
    "robust 0.1": Way("robust", label_smoothing=0.1),
    "nca_pair + sft": Way("nca_pair", sft=1.0),
    "apo_zero + sft": Way("apo_zero", sft=1.0),
    "beta 0.5": Way(beta=0.5),
    "beta 0.5 + sft": Way(beta=0.5, sft=1.0),
    "beta 1 + sft": Way(beta=1.0, sft=1.0),
    "stop at 0.02": Way(stop_drop=0.02),
    "half: chosen likelier": Way(selection="likelier"),
    "half: equally likely": Way(selection="near"),
    "half: least displaced": Way(selection="displacement"),
    "half: likely chosen": Way(selection="likely"),
    "half: margin per token": Way(selection="margin_per_token"),
    "half: at random": Way(selection="random"),
}
"""What is tried on the pairs of dpo_reward, with one seed."""
MORE_WAYS = {
    "stop at 0.1": Way(stop_drop=0.1),
    "half: widest margins": Way(selection="margin"),
    "sigmoid_norm": Way("sigmoid_norm"),
    "hinge": Way("hinge"),
    "exo_pair": Way("exo_pair", label_smoothing=0.001),
    "sppo_hard": Way("sppo_hard"),
    "apo_down": Way("apo_down"),
    "aot": Way("aot"),
    "discopop": Way("discopop"),
    "ipo + sft": Way("ipo", sft=1.0),
}
"""What is left, last."""
UNTRAINED = {"untrained": Way(steps=0)}
ADVISED = ("sigmoid", "sigmoid + sft", "beta 0.5", "beta 0.5 + sft")
"""Ways that are measured with three seeds and both rates on the pairs of all pipelines."""
ADVICE = "beta 0.5 + sft"


class Row(msgspec.Struct, frozen=True):
    """One training."""

    pipeline: str
    way: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.pipeline} | {self.way} | {self.rate:g} | seed {self.seed}"


def plan() -> list[Row]:
    """All rows, in the order in which they are measured."""

    def rows(
        runs: Iterable[str],
        ways: Iterable[str],
        seeds: Sequence[int],
        rates: Sequence[float] = RATES,
    ) -> list[Row]:
        return [
            Row(run, way, rate, seed)
            for rate in rates
            for seed in seeds
            for run in runs
            for way in ways
        ]

    low = RATES[:1]
    pipelines = list(RUNS)[:3]
    advised = ["dpo_reward", "divide_and_conquer", "llava_critic, strict"]
    return list(
        dict.fromkeys([
            *rows(advised, ADVISED, SEEDS),
            *rows(advised, [ADVICE], FRESH_SEEDS, low),
            *rows(["llava_critic", "dpo_reward, strict"], [ADVICE], SEEDS, low),
            *rows(["dpo_reward"], UNTRAINED, [*SEEDS, *FRESH_SEEDS], low),
            *rows(RUNS, ADVISED, [0]),
            *rows([*pipelines, "llava_critic, strict"], ["nca_pair", "beta 1 + sft"], [0]),
            *rows(["dpo_reward"], WAYS, [0]),
            *rows(["dpo_reward"], MORE_WAYS, [0]),
        ])
    )  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks losses", description=__doc__)
    default = Path(tempfile.gettempdir()) / "stream_engine_losses"
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=default)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--show", action="store_true", help="print the table and measure nothing")
    args = parser.parse_args(arguments)
    if not args.show:
        torch.set_num_threads(1)
        measure(args.out, args.runs, until=time.monotonic() + 60 * args.minutes)
    print("\n".join(table(kept(args.out))))


def measure(out: Path, runs: Path, *, until: float) -> None:
    """Rows that nobody has measured or is measuring, one after the other."""
    longest = 0.0
    for row in plan():
        if row.name in kept(out) or time.monotonic() + longest > until:
            continue
        with claim(runs, row.name) as is_mine:
            if not is_mine or row.name in kept(out):
                continue
            started = time.monotonic()
            figures = measured(row, run_of(runs, row.pipeline))
            longest = max(longest, time.monotonic() - started)
            with locked(runs / "rows.lock"):
                keep(out, row.name, figures)
            print(row.name, figures, file=sys.stderr, flush=True)


def measured(row: Row, run: Path) -> dict[str, Any]:
    """Train once, and count."""
    way = (WAYS | MORE_WAYS | UNTRAINED)[row.way]
    started = time.process_time()
    settings = LoopSettings(
        steps=way.steps,
        loss=way.loss,
        beta=way.beta,
        label_smoothing=way.label_smoothing,
        rpo_alpha=way.sft,
        stop_drop=way.stop_drop,
        learning_rate=row.rate,
        seed=row.seed,
    )
    pairs = SELECTIONS[way.selection](judged_pairs(run))
    torch.manual_seed(row.seed)
    model = load_checkpoint(checkpoint_path("instruct"))
    gains = train(model, [pair.row for pair in pairs], settings, say=lambda line: None)
    return {
        "pairs": len(pairs),
        "steps": len(gains),
        "chosen_gain": round(statistics.fmean(gains[-RECENT_STEPS:] or [0.0]), 3),
        **counted(model, settings),
        "cpu_s": round(time.process_time() - started),
    }


def counted(model: TinyLlava, settings: LoopSettings) -> dict[str, float]:
    """Wrong facts and clauses per answer on the held-out pictures, and on more of them."""
    more = msgspec.structs.replace(settings, pictures=MORE_PICTURES)
    wrong, clauses = by_picture(model, settings)
    wrong_more, _ = by_picture(model, more, first=settings.pictures)
    return {
        "wrong": round(statistics.fmean(wrong), 3),
        "error": standard_error(wrong),
        "wrong_more": round(statistics.fmean(wrong_more), 3),
        "error_more": standard_error(wrong_more),
        "clauses": round(statistics.fmean(clauses), 2),
    }


def by_picture(
    model: TinyLlava, settings: LoopSettings, *, first: int = 0
) -> tuple[list[float], list[float]]:
    """Wrong facts and clauses an answer, of each picture from number `first` on."""
    wrong, clauses = [], []
    for picture, answers in sampled_answers(model, settings, first=first):
        scene, question = picture.scene, picture.question
        wrong.append(statistics.fmean(count_wrong_facts(scene, question, a) for a in answers))
        clauses.append(statistics.fmean(len(read_facts(a, question)) for a in answers))
    return wrong, clauses


def standard_error(values: Sequence[float]) -> float:
    """Of their mean."""
    return round(statistics.stdev(values) / len(values) ** 0.5, 3)


# -- what several processes share -----------------------------------------------------------------


@functools.cache
def run_of(runs: Path, name: str) -> Path:
    """A finished run, made now if it is missing; with flags of its own, from the pipeline's run.

    The command is given to one that is there too: it does nothing, or refuses a run of other
    settings, whose pairs are not those of today.
    """
    pipeline, *flags = RUNS[name]
    run = runs / name
    copied = runs / f"{name}.copied"
    with locked(runs / f"{name}.lock"):
        command = ["run", "--demo", "--pipeline_name", pipeline, "--work_dir", str(run)]
        if flags:
            if not copied.exists():
                shutil.copytree(run_of(runs, pipeline), run, dirs_exist_ok=True)
                copied.touch()
            command = ["merge", str(run), *flags]
        words = [sys.executable, "-m", "stream_engine", *command]
        subprocess.run(words, check=True, stdout=sys.stderr)
    return run


@contextmanager
def claim(runs: Path, name: str) -> Iterator[bool]:
    """Whether this process may measure a row; another that has claimed it may not."""
    path = runs / "claims" / name.replace(" ", "_").replace("|", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Alone with a file of this name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kept(out: Path) -> dict[str, dict[str, Any]]:
    """The rows so far, by name."""
    return json.loads(out.read_text())["rows"] if out.exists() else {}


def keep(out: Path, name: str, figures: dict[str, Any]) -> None:
    """Add a row."""
    rows = kept(out) | {name: figures}
    ordered = {row.name: rows[row.name] for row in plan() if row.name in rows}
    lines = ",\n".join(f"  {json.dumps(n)}: {json.dumps(r)}" for n, r in ordered.items())
    about = json.dumps({"benchmark": "losses", "environment": environment()}, indent=1)
    new = out.with_suffix(".new")
    new.write_text(f'{about[:-2]},\n "rows": {{\n{lines}\n }}\n}}\n')
    os.replace(new, out)


# -- the table ------------------------------------------------------------------------------------


def table(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each pipeline, way and rate: means over the seeds, and how far these lie apart.

    The fresh seeds have a line of their own.
    """
    found: dict[tuple[str, str, float, bool], list[Mapping[str, Any]]] = {}
    for row in plan():
        if row.name in rows:
            kind = (row.pipeline, row.way, row.rate, row.seed in FRESH_SEEDS)
            found.setdefault(kind, []).append(rows[row.name])
    lines = [
        f"{'pairs of':20} {'way':24} {'rate':6} {'seeds':>5} {'wrong':>6} {'from - to':>13} "
        f"{'more':>6} {'clauses':>7} {'gain':>7} {'steps':>5}"
    ]
    for (pipeline, way, rate, _), figures in found.items():
        wrong = [row["wrong"] for row in figures]
        more = [row["wrong_more"] for row in figures if "wrong_more" in row]
        mean_more = f"{statistics.fmean(more):.2f}" if len(more) == len(wrong) else "-"
        clauses, gain, steps = (
            statistics.fmean(row[name] for row in figures)
            for name in ("clauses", "chosen_gain", "steps")
        )
        lines.append(
            f"{pipeline:20} {way:24} {rate:<6g} {len(wrong):5} {statistics.fmean(wrong):6.2f} "
            f"{min(wrong):6.2f} {max(wrong):6.2f} {mean_more:>6} {clauses:7.2f} {gain:7.3f} "
            f"{steps:5.0f}"
        )
    return lines
