"""Step `demo`: the three pipelines on the GPU against the same on CPU, in float32 and bfloat16."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from stream_engine.demo.score import score_pairs
from stream_engine.outputs.reading import read_pairs
from stream_engine.pipelines import PIPELINES
from stream_engine.records import Answer, SampleRollouts
from stream_engine.run_dir.results import read_results
from tests.gpu.runner import ROOT
from tests.gpu.step import Kit

RUNS = {"cpu": "float32", "float32": "float32", "bfloat16": "bfloat16"}
"""Name of a run -> its dtype; all but the first on the GPU."""
REHEARSED = "dpo_reward"
LISTED = 12
"""Differences named for each run; all are counted."""


def run(kit: Kit) -> None:
    """The runs at once, then what they say."""
    jobs = [(pipeline, name) for pipeline in PIPELINES for name in runs_of(kit, pipeline)]
    with ThreadPoolExecutor(2 if kit.rehearse else len(jobs)) as threads:
        logs = dict(zip(jobs, threads.map(lambda job: run_pipeline(kit, *job), jobs)))
    for pipeline in dict(jobs):
        for name in runs_of(kit, pipeline):
            print(f"== {pipeline} {name}\n{logs[pipeline, name]}")
        kit.part(pipeline, lambda pipeline=pipeline: compared(kit, pipeline))


def runs_of(kit: Kit, pipeline: str) -> list[str]:
    """A rehearsal leaves out what would run the same code again."""
    return list(RUNS) if not kit.rehearse or pipeline == REHEARSED else []


def folder(kit: Kit, pipeline: str, name: str) -> Path:
    return kit.scratch / f"demo_{pipeline}_{name}"


def run_pipeline(kit: Kit, pipeline: str, name: str) -> str:
    """Run one; its output. Its float32 run on the GPU is interpreted in a rehearsal."""
    size = "--max_samples=2 --sample_k=2 --rank=1 --max_new_tokens=5"
    if not kit.rehearse:
        size = "--max_samples=24 --sample_k=6 --rank=2 --samples_per_shard=8"
    device = "cpu" if name == "cpu" else kit.device
    command = [sys.executable, "-m", "stream_engine", "run", "--demo", *size.split()]
    command += [f"--pipeline_name={pipeline}", f"--device={device}", f"--dtype={RUNS[name]}"]
    command += ["--look_ahead=never", f"--work_dir={folder(kit, pipeline, name)}"]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    if name != "float32":  # the interpreter takes no bfloat16
        variables.pop("STREAM_KERNELS_FORM", None)
    timeout_s = max(5.0, kit.seconds_left - 5)
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=variables,
            timeout=timeout_s,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as error:
        return f"ended after {timeout_s:.0f} s: {(error.stdout or b'').decode()[-3000:]}"
    return f"exit status {done.returncode}: {done.stdout[-3000:]}"


def compared(kit: Kit, pipeline: str) -> dict[str, Any]:
    """Answers and pairs of each run beside those of the run on CPU.

    Raises:
        AssertionError: when float32 on the GPU gives other pairs, or answers that differ by more
            than a rounding at a token that was a close call.
    """
    expected = answers(folder(kit, pipeline, "cpu"))
    pairs = pairs_of(folder(kit, pipeline, "cpu"))
    found: dict[str, Any] = {"answers": len(expected), "pairs": len(pairs)}
    for name in runs_of(kit, pipeline):
        work_dir = folder(kit, pipeline, name)
        own, own_pairs = answers(work_dir), pairs_of(work_dir)
        assert own.keys() == expected.keys(), f"{name}: other questions or answers"
        differing = [
            difference(expected[key], own[key]) | {"answer": key}
            for key in expected
            if own[key].token_ids != expected[key].token_ids
        ]
        found[name] = {
            "differing_answers": len(differing),
            "pairs_not_on_cpu": len(own_pairs - pairs),
            "max_logp_difference": max(
                logp_difference(expected[key], own[key]) for key in expected
            ),
            "truth": score_pairs(read_pairs(work_dir / "dataset")),
            "differences": differing[:LISTED],
        }
    kit.keep(**{pipeline: found})
    exact = found.get("float32", found["cpu"])
    assert exact["differing_answers"] <= len(expected) // 50, "float32 draws other answers"
    assert exact["differing_answers"] or not exact["pairs_not_on_cpu"], "float32 pairs otherwise"
    return found


def answers(work_dir: Path) -> dict[str, Answer]:
    """Every answer of a run, by its sample's key and its number."""
    return {
        f"{record.key}:{answer.index}": answer
        for path in sorted((work_dir / "results/rollouts").glob("*.msgpack"))
        for record in read_results(path, SampleRollouts)
        for answer in record.answers
    }


def pairs_of(work_dir: Path) -> set[tuple[str, str, str]]:
    files = sorted((work_dir / "dataset").glob("train-0*.parquet"))
    columns = ["idx", "chosen", "rejected"]
    rows = [row for file in files for row in pq.read_table(file, columns=columns).to_pylist()]
    return {(row["idx"], row["chosen"], row["rejected"]) for row in rows}


def common(one: Answer, other: Answer) -> int:
    """How many tokens two answers begin with alike."""
    same = (a == b for a, b in zip_longest(one.token_ids, other.token_ids))
    return next((place for place, equal in enumerate(same) if not equal), len(one.token_ids))


def logp_difference(one: Answer, other: Answer) -> float:
    """The largest, over the tokens that two answers begin with alike."""
    pairs = list(zip(one.token_logps, other.token_logps))[: common(one, other)]
    return max((abs(a - b) for a, b in pairs), default=0.0)


def difference(expected: Answer, own: Answer) -> dict[str, Any]:
    """Where two answers part, and the log-probs of what each took there; None: it ended."""
    place = common(expected, own)
    named: dict[str, Any] = {"place": place}
    for name, answer in (("cpu", expected), ("gpu", own)):
        inside = place < len(answer.token_ids)
        named[name] = {
            "token": answer.token_ids[place] if inside else answer.end_token_id,
            "logp": answer.token_logps[place] if inside else answer.end_logp,
        }
    return named
