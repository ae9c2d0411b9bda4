"""llava_critic on the drawn world: a verdict's probability in place of its sampled word.

    python -m tests.benchmarks.verdict_probability RUN [--questions 300] [--kept FILE] [--out FILE]

The critic of a finished run is given each of its replies again up to the verdict's sentence, and
asked how likely each of the three sentences is there. A match is then worth p(first) - p(second),
of both orders, where it was worth the word. Printed are the probabilities that the said verdicts
have, and the share of pairs that are right with words and with probabilities, on the same
questions. `--kept` holds what was asked, so that it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterator
from pathlib import Path

import torch

from stream_engine.config import ModelConfig, ModelRole, SamplingConfig
from stream_engine.demo import checkpoint_path
from stream_engine.engine import Engine, ScoreRequest, load_engine
from stream_engine.pipelines.prompts import critic_prompt
from stream_engine.records import Sample, SampleRewards, SampleRollouts
from stream_engine.run_dir.manifest import Manifest
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.shards import read_shard
from tests.benchmarks.critics import (
    Question,
    bradley_terry,
    everyone,
    mean,
    measured,
    questions_of,
    top_and_bottom,
    widest,
)

SENTENCE = re.compile(r"The first response is|The second response is|Two responses are")
Asked = tuple[int, int, str, float, float, float]
"""First and second answer, the said verdict, and the probabilities of first, second and equal."""


class Verdicts:
    """The critic's verdicts as probabilities, given the reasoning before them."""

    def __init__(self) -> None:
        role = ModelRole("critic", str(checkpoint_path("critic")), "rewards", draws=False)
        self.engine: Engine = load_engine(role, ModelConfig(device="cpu"), SamplingConfig())
        self.colon = self.engine.model.encode_text(":")
        first, second = (self.ids(f"The {word}")[-1] for word in ("first", "second"))
        self.watched = [self.ids("The")[0], self.ids("Two")[0], first, second]

    def ids(self, text: str) -> tuple[int, ...]:
        """The tokens of a reply's beginning, which stands behind a colon."""
        return tuple(self.engine.model.encode_text(f": {text}")[len(self.colon) :])

    def asked(
        self, sample: Sample, rollouts: SampleRollouts, rewards: SampleRewards
    ) -> Iterator[Asked]:
        """All of one question's readable verdicts."""
        texts = {answer.index: answer.text for answer in rollouts.answers}
        said = [c for c in rewards.details["comparisons"] if c["verdict"] != "unparsed"]
        prompts = [
            critic_prompt(sample.question, texts[c["first"]], texts[c["second"]]) for c in said
        ]
        [(_, shared)] = self.engine.prepare_shared([(sample.key, prompts, sample.images)])
        continuations = []
        for comparison, suffix in zip(said, shared.suffixes):
            start = [match.start() for match in SENTENCE.finditer(comparison["reply"])][-1]
            before = comparison["reply"][:start].strip()
            continuations += [(*suffix, *self.ids(before)), (*suffix, *self.ids(f"{before} The"))]
        request = ScoreRequest(sample.key, shared.prompt, tuple(continuations))
        [found] = self.engine.next_token_logps([request], self.watched)
        for place, comparison in enumerate(said):
            the, two, _, _ = map(math.exp, found.logps[2 * place])
            _, _, first, second = map(math.exp, found.logps[2 * place + 1])
            yield (
                *(comparison["first"], comparison["second"], comparison["verdict"]),
                *(the * first, the * second, two),
            )


def asked_of(run_dir: RunDir, limit: int, kept: Path) -> list[list[Asked]]:
    """Every question's verdicts, in the run's order; those that are kept are not asked again."""
    found = json.loads(kept.read_text()) if kept.exists() else []
    verdicts = None
    place = 0
    for info in Manifest.load(run_dir).shards:
        rollouts = {
            r.key: r for r in read_results(run_dir.result("rollouts", info.index), SampleRollouts)
        }
        samples = {s.key: s for s in read_shard(run_dir.shard(info.index), info)}
        for rewards in read_results(run_dir.result("rewards", info.index), SampleRewards):
            place += 1
            if len(found) < place <= limit:
                verdicts = verdicts or Verdicts()
                key = rewards.key
                found.append(list(verdicts.asked(samples[key], rollouts[key], rewards)))
                kept.write_text(json.dumps(found))
    return found[:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--kept", type=Path, default=Path("verdict_probability.json"))
    parser.add_argument("--out", type=Path, help="also write the figures as JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    run_dir = RunDir(arguments.run)
    asked = asked_of(run_dir, arguments.questions, arguments.kept)
    by_word = list(questions_of(run_dir))[: len(asked)]
    by_probability = [
        Question({(a, b): first - second for a, b, _, first, second, _ in each}, question.wrong)
        for question, each in zip(by_word, asked)
    ]
    places = {"first": 3, "second": 4, "equal": 5}
    said = sorted(row[places[row[2]]] for each in asked for row in each)
    p_said = {"mean": statistics.fmean(said), "1 %": said[len(said) // 100]}
    print(f"p of what was said: mean {p_said['mean']:.4f}, 1 % {p_said['1 %']:.4f}")
    table: dict[str, dict[str, float]] = {"p of what was said": p_said}
    for name, questions in (("words", by_word), ("probabilities", by_probability)):
        for pairing in (top_and_bottom, widest):
            row = table[f"{name}, {pairing.__name__}"] = measured(
                questions, everyone, bradley_terry, mean, pairing
            )
            print(f"{name:14} {pairing.__name__:16} {row}")
    if arguments.out:
        arguments.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
