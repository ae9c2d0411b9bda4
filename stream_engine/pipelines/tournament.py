"""Tournament: which of one sample's answers have been compared, who won, and what that scores."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from stream_engine.pipelines.asking import Ask, Replies, Reply
from stream_engine.pipelines.prompts import critic_prompt
from stream_engine.pipelines.ranking import count_words
from stream_engine.pipelines.schedules import (
    Match,
    Schedule,
    fixed_matches,
    num_rounds,
    swiss_matches,
)
from stream_engine.pipelines.strengths import log_strengths
from stream_engine.pipelines.verdicts import (
    VALUES,
    Verdict,
    parse_verdict,
    parse_verdict_rlaifv,
)
from stream_engine.records import AnswerScore, Sample, SampleRewards, SampleRollouts

Scoring = Literal["wins", "bradley_terry"]


@dataclass
class Tournament:
    """The matches of one sample's answers. `verdicts` goes by (first, second) answer."""

    sample: Sample
    rollouts: SampleRollouts
    schedule: Schedule
    compat: Literal["rlaifv"] | None = None
    scoring: Scoring = "wins"
    copies: dict[int, list[int]] = field(default_factory=dict)
    round: int = 0
    matches: list[Match] = field(default_factory=list)
    verdicts: dict[Match, Verdict | None] = field(default_factory=dict)
    replies: dict[Match, str] = field(default_factory=dict)
    judge: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.texts = {answer.index: answer.text for answer in self.rollouts.answers}
        first: dict[str, int] = {}
        for index, text in self.texts.items():
            same = index if self.compat else first.setdefault(text, index)
            self.copies.setdefault(same, []).append(index)
        self.judge["identical"] = len(self.texts) - len(self.copies)

    @property
    def is_over(self) -> bool:
        return self.round == num_rounds(self.schedule, len(self.copies))

    def next_round(self) -> Ask:
        """The questions of the next round of matches, both orders of each."""
        players = list(self.copies)
        if self.schedule == "swiss":
            strengths = self.strengths()
            standing = sorted(players, key=lambda i: (-strengths[i], i))
            new = swiss_matches(standing, self.matches)
        else:
            new = fixed_matches(self.schedule, players)
        self.round += 1
        self.matches += new
        questions = {
            comparison_name(order): critic_prompt(
                self.sample.question, self.texts[order[0]], self.texts[order[1]]
            )
            for match in new
            for order in (match, match[::-1])
        }
        return Ask(self.sample.key, questions, self.sample.images)

    def note(self, replies: Replies) -> None:
        """Read a round's replies."""
        parse = parse_verdict_rlaifv if self.compat else parse_verdict
        for match in self.matches:
            for order in (match, match[::-1]):
                reply = replies.get(comparison_name(order))
                if isinstance(reply, Reply):
                    verdict = parse(reply.text)
                    self.verdicts[order], self.replies[order] = verdict, reply.text
                    self.judge.update(["comparisons", f"verdict_{verdict or 'unparsed'}"])
                elif reply is not None:
                    self.judge["not_asked"] += 1

    def outcome(self, match: Match) -> int:
        """1: the first of the match wins, -1: the second, 0: a tie."""
        there = VALUES[self.verdicts.get(match)]
        back = -VALUES[self.verdicts.get(match[::-1])]
        return there if there == back else 0

    def strengths(self) -> dict[int, float]:
        """Bradley-Terry strengths; of a match's two orders, one that calls a tie leaves half."""
        return log_strengths(
            list(self.copies),
            (
                (
                    *match,
                    (VALUES[self.verdicts.get(match)] - VALUES[self.verdicts.get(match[::-1])]) / 2,
                )
                for match in self.matches
            ),
        )

    def table(self) -> dict[int, Counter[str]]:
        """Wins, losses and ties of every answer."""
        table: dict[int, Counter[str]] = {index: Counter() for index in self.copies}
        for match in self.matches:
            results = {1: ("wins", "losses"), -1: ("losses", "wins"), 0: ("ties", "ties")}
            for index, result in zip(match, results[self.outcome(match)]):
                table[index][result] += 1
        return table

    def rewards(self) -> SampleRewards:
        """The scores, once all matches are played."""
        self.count_matches()
        table, scores = self.table(), []
        strengths = self.strengths() if self.scoring == "bradley_terry" else {}
        unscored: dict[str, list[int]] = {}
        for index, copies in self.copies.items():
            if reason := self.reason_unscored(index):
                unscored.setdefault(reason, []).extend(copies)
                continue
            row = table[index]
            if self.compat == "rlaifv":
                score: float = sum(
                    VALUES[v] for (first, _), v in self.verdicts.items() if first == index
                )
            elif self.scoring == "bradley_terry":
                score = strengths[index]
            else:
                score = row["wins"] - row["losses"]
            scores += [
                AnswerScore(
                    index=copy,
                    score=float(score),
                    scores={result: row[result] for result in ("wins", "losses", "ties")},
                    details={} if copy == index else {"same_text_as": index},
                )
                for copy in copies
            ]
        return SampleRewards(
            key=self.sample.key,
            scores=sorted(scores, key=lambda score: score.index),
            unscored={reason: sorted(indices) for reason, indices in unscored.items()},
            judge=dict(self.judge),
            details={"comparisons": self.comparisons()},
        )

    def comparisons(self) -> list[dict[str, Any]]:
        """Every verdict with the critic's reasoning, to be read."""
        return [
            {
                "first": first,
                "second": second,
                "verdict": verdict or "unparsed",
                "reply": self.replies[first, second],
            }
            for (first, second), verdict in sorted(self.verdicts.items())
        ]

    def reason_unscored(self, index: int) -> str | None:
        """Why an answer has no score, if so; in compat every answer has one."""
        if self.compat or any(index in order for order, v in self.verdicts.items() if v):
            return None
        return "no_verdict" if any(index in match for match in self.matches) else "not_compared"

    def count_matches(self) -> None:
        """Statistics over matches, whatever the score is made of."""
        words = {index: count_words(text) for index, text in self.texts.items()}
        for match in self.matches:
            self.judge["matches"] += 1
            winner = {1: match[0], -1: match[1]}.get(self.outcome(match))
            if winner is None:
                self.judge["ties"] += 1
                there, back = self.verdicts.get(match), self.verdicts.get(match[::-1])
                self.judge["flips"] += there == back and there in ("first", "second")
            else:
                loser = match[0] + match[1] - winner
                self.judge["won"] += 1
                self.judge["won_unequal_length"] += words[winner] != words[loser]
                self.judge["won_by_longer"] += words[winner] > words[loser]


def comparison_name(order: Match) -> str:
    """The name of a comparison within its sample."""
    return f"critic/{order[0]}/{order[1]}"
