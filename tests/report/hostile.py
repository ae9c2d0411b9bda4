"""A run whose every text means harm: markup, scripts, controls, template code, and a megabyte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from stream_engine.records import Answer, AnswerScore, Sample, SampleRewards, SampleRollouts
from stream_engine.report.run import ReportedRun
from stream_engine.run_dir.manifest import InputInfo, Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.shards import write_shard
from tests.report.runs import reported
from tests.synthetic import run_merge, synthetic_rollouts, synthetic_sample, write_stage

OVERRIDE, ZERO_WIDTH = "\u202e", "\u200b"
TEXTS = (
    "<script>window.harmed = 'script'</script>",
    "\"'><img src=x onerror=\"window.harmed = 'img'\">",
    "</script></title></textarea><svg onload=\"window.harmed = 'svg'\">",
    "<a href=\"javascript:window.harmed='link'\" onclick=\"window.harmed='click'\">click</a>",
    "{{ 7 * 7 }} {% raw %} ${7 * 7} #{7 * 7}",
    "]);window.harmed = 'json';//\\u2028\u2028\u2029",
    f"right {OVERRIDE}to left {ZERO_WIDTH}and \u2066isolated\ufeff",
    "مرحبا بالعالم שלום",
    "\x1b]0;title\x07\x1b[2J\x00\x9b31m",
    "__proto__ constructor hasOwnProperty",
    "&lt;b&gt; &amp; <!-- --> <style>body { display: none }</style>",
    "megabyte " + "<b>long</b> " * 90_000,
)
"""Each is an answer, a question, an id, a source, a fact, a reply of the critic, and so on."""


def hostile_run(folder: Path) -> ReportedRun:
    """One sample for each text, with answers, details, and one that was set aside."""
    run_dir = RunDir(folder)
    samples = [hostile_sample(number, text) for number, text in enumerate(TEXTS)]
    info = write_shard(run_dir.shard(0), 0, samples)
    manifest = Manifest.load(run_dir)
    manifest.append_shard(info, source=TEXTS[1])
    rollouts = [hostile_rollouts(sample, number) for number, sample in enumerate(samples)]
    write_stage(run_dir, info, "rollouts", rollouts)
    rewards = [hostile_rewards(one, number) for number, one in enumerate(rollouts)]
    write_stage(run_dir, info, "rewards", rewards[:-1], samples[-1:])
    manifest.append_input(
        InputInfo(
            source=TEXTS[0],
            fingerprint="",
            settings="",
            read=len(samples) + 1,
            added=len(samples),
            known=0,
            rejected={TEXTS[1]: 1},
        )
    )
    line = {"reason": TEXTS[1], "detail": TEXTS[2], "source": TEXTS[0], "row": 3, "idx": TEXTS[3]}
    run_dir.quarantine("input-x").write_bytes(msgspec.json.encode(line) + b"\n")
    run_merge(run_dir)
    return reported(run_dir)


def hostile_sample(number: int, text: str) -> Sample:
    sample = synthetic_sample(number, question=text)
    return msgspec.structs.replace(sample, idx=f"{number} {text[:2000]}", ds_name=text[:300])


def hostile_rollouts(sample: Sample, number: int) -> SampleRollouts:
    """Ten answers, each a different text, the sample's own first among them."""
    rollouts = synthetic_rollouts(sample, 10, num_words=12)
    answers: list[Answer] = []
    for answer in rollouts.answers:
        text = TEXTS[(number + answer.index) % len(TEXTS)]
        if text is TEXTS[-1] and number < len(TEXTS) - 1:
            text = text[:2000]  # whole in one sample: each comparison of two takes its time
        answers.append(msgspec.structs.replace(answer, text=f"{text} {answer.text}"))
    return msgspec.structs.replace(rollouts, answers=answers)


def hostile_rewards(rollouts: SampleRollouts, number: int) -> SampleRewards:
    """Scores that go down, with facts, comparisons, log-probs and replies."""
    text = TEXTS[number][:3000]
    scores = []
    for answer in rollouts.answers:
        total = 5.0 - answer.index
        details: dict[str, Any] = {
            "facts": [{"fact": text, "question": text, "holds": False, "p_yes": 0.2, "p_no": 0.8}],
            text: text,
        }
        scores.append(
            AnswerScore(
                index=answer.index,
                score=total,
                scores={"sum": total, "avg": total, text: 1.0},
                token_logps=[-1.0 for _ in answer.scored_ids],
                details=details,
            )
        )
    comparisons = [
        {"first": i, "second": j, "verdict": "first" if i < j else text, "reply": text}
        for i in range(10)
        for j in range(10)
        if i != j
    ]
    return SampleRewards(
        key=rollouts.key,
        scores=scores,
        judge={text[:100]: 1.0},
        details={"comparisons": comparisons, "unread": {text: text}},
    )
