"""Where the time of a run went: its models, and everything beside them.

Told by the headers of the results, to which each worker adds what it spent since the one before.
What a merge spends is not told there.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

import msgspec

from stream_engine.config import STAGES
from stream_engine.run_dir.results import ResultHeader
from stream_engine.run_dir.state import RunState


class Timing(msgspec.Struct, frozen=True):
    """Of the questions that have a result: per question, over all workers."""

    questions: int
    stage_s: dict[str, float]
    """Wall seconds of each stage, models and everything else together."""
    cpu_ms: dict[str, float]
    """CPU milliseconds beside the models, by what they went into (see timing.Part)."""

    @property
    def beside_ms(self) -> float:
        """CPU milliseconds beside the models, all together."""
        return sum(self.cpu_ms.values())

    def lines(self) -> list[str]:
        """For people."""
        if not self.questions:
            return ["timing:  no question has a result"]
        stages = " + ".join(f"{stage} {s:.3f} s" for stage, s in self.stage_s.items())
        return [
            f"timing:  a question took {stages} of a worker, models included",
            f"timing:  and {self.beside_line()}",
        ]

    def beside_line(self) -> str:
        """`0.53 ms of CPU beside the models = 0.20 leases + ...`"""
        parts = " + ".join(f"{ms:.2f} {part}" for part, ms in self.cpu_ms.items())
        return f"{self.beside_ms:.2f} ms of CPU beside the models = {parts or 'nothing'}"


def timing_of(state: RunState) -> Timing:
    """The times of a run as of its last refresh."""
    return timing_from(state.headers())


def timing_from(headers: Iterable[ResultHeader]) -> Timing:
    """The times that the headers of results tell."""
    seconds: dict[str, float] = dict.fromkeys(STAGES, 0.0)
    spent: dict[str, float] = {}
    num_questions = 0
    for stage, group in groupby(headers, key=lambda header: header.stage):
        of_stage = list(group)
        num_questions = max(num_questions, sum(header.num_samples for header in of_stage))
        for header in of_stage:
            seconds[stage] += header.created_by.get("seconds", 0.0)
            for part, cpu_s in header.created_by.get("cpu_s", {}).items():
                spent[part] = spent.get(part, 0.0) + cpu_s
    each = max(1, num_questions)
    return Timing(
        questions=num_questions,
        stage_s={stage: total / each for stage, total in seconds.items()},
        cpu_ms={part: 1000 * spent[part] / each for part in sorted(spent)},
    )
