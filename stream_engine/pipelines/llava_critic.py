"""llava_critic: a critic VLM judges answers in pairs; the score is strength, or wins minus losses.

Every match is judged in both orders, since critics favour a place. An answer wins a match when both
orders say so; anything else is a tie, in particular a verdict that names the same place in both
orders (a flip). Answers with the same text are one answer here and share its score.

`critic_compat rlaifv` scores as RLAIF-V's data engine does: the verdict of each ordered pair counts
for the answer that stands first, with its own reading of replies, and repeated texts compete.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from stream_engine.config import ModelRole, RunConfig, SamplingConfig, Stage
from stream_engine.errors import ConfigError, RecordError
from stream_engine.pipelines.asking import ask, failure_of
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.ranking import rank_by_wins
from stream_engine.pipelines.schedules import VERDICTS_PER_MATCH, num_matches
from stream_engine.pipelines.tournament import Scoring, Tournament
from stream_engine.records import (
    Failure,
    PreferencePair,
    Sample,
    SampleRewards,
    SampleRollouts,
)

if TYPE_CHECKING:
    from stream_engine.engine import Engine


class LlavaCriticOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is compared with what, and how the critic writes."""

    critic_pairs: int | Literal["all", "swiss"] = "all"
    """Pairs of answers to compare, each in both orders: all, swiss (a third of them for ten
    answers, about as good), or N."""
    critic_scores: Literal["auto", "wins", "bradley_terry"] = "auto"
    """What an answer scores: wins minus losses, or its Bradley-Terry strength (a logarithm), which
    tells more; auto: strength, but wins with critic_compat, and where `compat` ranks all pairs."""
    critic_compat: Literal["rlaifv"] | None = None
    """rlaifv: the sum over ordered pairs of RLAIF-V's data engine, and its reading of replies."""
    critic_temperature: float = 0.7
    """Temperature of the critic."""
    critic_max_new_tokens: int = 512
    """Longest reply of the critic, in tokens."""


class LlavaCriticPipeline(Pipeline):
    """`instruct` draws, `critic` compares."""

    name: ClassVar[str] = "llava_critic"
    Options: ClassVar[type[msgspec.Struct]] = LlavaCriticOptions
    needs_logps: ClassVar[bool] = False
    judge_rates: ClassVar[Mapping[str, tuple[str, str]]] = {
        "first_rate": ("verdict_first", "comparisons"),
        "second_rate": ("verdict_second", "comparisons"),
        "equal_rate": ("verdict_equal", "comparisons"),
        "unparsed_rate": ("verdict_unparsed", "comparisons"),
        "tie_rate": ("ties", "matches"),
        "flip_rate": ("flips", "matches"),
        "length_win_rate": ("won_by_longer", "won_unequal_length"),
    }

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        pairs, compat = self.options.critic_pairs, self.options.critic_compat
        if isinstance(pairs, int) and pairs < 1:
            raise ConfigError(f"critic_pairs must be all, swiss or at least 1, it is {pairs}")
        if compat and pairs != "all":
            raise ConfigError(f"critic_compat {compat} needs critic_pairs all, it is {pairs}")
        if compat and self.scoring != "wins":
            raise ConfigError(f"critic_compat {compat} needs critic_scores wins")

    @property
    def scoring(self) -> Scoring:
        """What `critic_scores` means here."""
        asked = self.options.critic_scores
        if asked != "auto":
            return asked
        return "wins" if self.options.critic_compat else "bradley_terry"

    def roles(self) -> tuple[ModelRole, ...]:
        config, options = self.config, self.options
        return (
            *self.answer_roles(),
            ModelRole(
                "critic",
                self.required_path("reward_model_path"),
                "rewards",
                config.reward_model_name,
                SamplingConfig(
                    temperature=options.critic_temperature,
                    max_new_tokens=options.critic_max_new_tokens,
                ),
            ),
        )

    def settings(self, stage: Stage) -> dict[str, Any]:
        if stage != "rewards":
            return {}
        return msgspec.to_builtins(self.options) | {"critic_scores": self.scoring}

    def planned_calls(self, num_samples: int) -> dict[str, int]:
        matches = num_matches(self.options.critic_pairs, self.config.sample_k)
        return {"critic": num_samples * matches * VERDICTS_PER_MATCH}

    def rewards(
        self,
        engines: Mapping[str, Engine],
        samples: Sequence[tuple[Sample, SampleRollouts]],
    ) -> Iterator[SampleRewards | Failure]:
        pairs, compat = self.options.critic_pairs, self.options.critic_compat
        tournaments = {
            s.key: Tournament(s, rollouts, pairs, compat, self.scoring) for s, rollouts in samples
        }
        waiting = list(tournaments.values())
        while waiting:
            yield from (t.rewards() for t in waiting if t.is_over)
            asks = [t.next_round() for t in waiting if not t.is_over]
            waiting = []
            for key, replies in ask(engines["critic"], asks, seed=self.config.seed):
                tournament = tournaments[key]
                if isinstance(replies, RecordError):
                    yield failure_of(tournament.sample, replies)
                    continue
                tournament.note(replies)
                if tournament.is_over:
                    yield tournament.rewards()
                else:
                    waiting.append(tournament)

    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        config, options = self.config, self.options
        if config.compat and options.critic_scores == "auto" and options.critic_pairs == "all":
            rewards = rewards if options.critic_compat else by_wins(rewards)
        return rank_by_wins(
            rewards,
            rank=config.rank,
            strict_follow_rank=config.strict_follow_rank,
            compat=config.compat,
        )


def by_wins(rewards: SampleRewards) -> SampleRewards:
    """The same with wins minus losses for scores, which are kept beside the strengths."""
    scores = [
        msgspec.structs.replace(score, score=float(score.scores["wins"] - score.scores["losses"]))
        for score in rewards.scores
    ]
    return msgspec.structs.replace(rewards, scores=scores)
