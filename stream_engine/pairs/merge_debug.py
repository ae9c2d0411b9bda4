"""`--debug`: what the merge saw and decided, as JSON lines that a person can read.

ranked.jsonl   every scored sample with its answers, best first
pairs.jsonl    the pairs that were kept, and the formats that could not express them
drops.jsonl    the pairs that were dropped, with the reason
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import msgspec

from stream_engine.pairs.filters import Candidate
from stream_engine.pipelines.ranking import count_words
from stream_engine.records import Answer, Sample, SampleRewards, SampleRollouts
from stream_engine.store import files as store
from stream_engine.store.base import Location, Spool

NAMES = ("ranked", "pairs", "drops")


class DebugLines:
    """The lines about some samples, made where these are read."""

    def __init__(self) -> None:
        self.lines = {name: bytearray() for name in NAMES}
        self.expected: list[tuple[Sample, Candidate]] = []

    def ranked(self, sample: Sample, rollouts: SampleRollouts, rewards: SampleRewards) -> None:
        """A sample's answers with their scores, best first, those without a score last."""
        scores = {score.index: score for score in rewards.scores}
        unscored = {i: reason for reason, indices in rewards.unscored.items() for i in indices}
        order = sorted(scores.values(), key=lambda score: (-score.score, score.index))
        answers = {answer.index: answer for answer in rollouts.answers}
        lines = [
            {
                **shown(answers[score.index]),
                "score": score.score,
                "scores": score.scores,
                "details": score.details,
            }
            for score in order
        ]
        lines += [
            {**shown(answer), "unscored": unscored.get(answer.index, "no score")}
            for answer in rollouts.answers
            if answer.index not in scores
        ]
        self._write("ranked", sample, {"answers": lines})

    def expect(self, sample: Sample, candidate: Candidate) -> None:
        """A pair that was kept, and that the formats are now asked about."""
        self.expected.append((sample, candidate))

    def dropped(self, sample: Sample, candidate: Candidate, reason: str) -> None:
        """A pair that was dropped."""
        self._write("drops", sample, {"reason": reason, **shown_pair(candidate)})

    def take(self, refusals: Mapping[str, Sequence[str | None]]) -> dict[str, bytes]:
        """All lines since the last call; `refusals` are by format those of the kept pairs."""
        for number, (sample, candidate) in enumerate(self.expected):
            by = {name: each[number] for name, each in refusals.items() if each[number] is not None}
            self._write("pairs", sample, {**shown_pair(candidate), "refused_by": by})
        taken = {name: bytes(lines) for name, lines in self.lines.items()}
        self.lines = {name: bytearray() for name in NAMES}
        self.expected = []
        return taken

    def _write(self, name: str, sample: Sample, content: dict[str, Any]) -> None:
        line = {"idx": sample.idx, "key": sample.key, "question": sample.question, **content}
        self.lines[name] += msgspec.json.encode(line) + b"\n"


class DebugFiles:
    """The three files in a folder, each replaced when all is done; None: there are none."""

    def __init__(self, folder: Location | None) -> None:
        self.folder = folder
        self.spools: dict[str, Spool] = {}
        self._stack = ExitStack()

    def __enter__(self) -> DebugFiles:
        if self.folder is not None:
            for name in NAMES:
                self.spools[name] = self._stack.enter_context(store.spool(self.folder))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._stack:
            if error is None:
                for name, spool in self.spools.items():
                    assert self.folder is not None
                    path = self.folder / f"{name}.jsonl"
                    spool.publish(path, store.version_of(path))

    def write(self, lines: Mapping[str, bytes]) -> None:
        """Add lines to each file."""
        for name, content in lines.items():
            self.spools[name].file.write(content)


def shown(answer: Answer) -> dict[str, Any]:
    """An answer as a person reads it."""
    return {
        "index": answer.index,
        "text": answer.text,
        "words": count_words(answer.text),
        "finish_reason": answer.finish_reason,
    }


def shown_pair(candidate: Candidate) -> dict[str, Any]:
    """A pair as a person reads it."""
    return {
        "margin": candidate.pair.margin,
        "chosen": {**shown(candidate.chosen), "score": candidate.pair.chosen_score},
        "rejected": {**shown(candidate.rejected), "score": candidate.pair.rejected_score},
    }
