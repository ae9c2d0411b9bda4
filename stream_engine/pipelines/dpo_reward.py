"""dpo_reward: answers are scored by the implicit reward of a DPO-trained model.

For a reward model that DPO trained from the instruct model (Rafailov et al. 2023, eq. 5), up to a
term of the question alone,

    r(answer) = beta * (log p_reward(answer) - log p_instruct(answer))

per token over the answer and the end token when one was generated. The instruct half fell out of
generation; the reward model scores the very ids that were sampled, over one prefix a question.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from stream_engine.config import ModelRole, Stage
from stream_engine.errors import ConfigError
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.ranking import rank_by_reward
from stream_engine.records import (
    Answer,
    AnswerScore,
    Failure,
    PreferencePair,
    Sample,
    SampleRewards,
    SampleRollouts,
)
from stream_engine.servers import served

if TYPE_CHECKING:
    from stream_engine.engine import Engine


class DPORewardPipeline(Pipeline):
    """Two models of one family and tokenizer: `instruct` draws, `reward` scores."""

    name: ClassVar[str] = "dpo_reward"

    def roles(self) -> tuple[ModelRole, ...]:
        if served(self.config.reward_model_path):
            raise ConfigError(
                f"{self.name} needs the reward model's log-probs of given answers, which chat "
                "completions do not tell: give --reward_model_path a checkpoint"
            )
        return (
            *self.answer_roles(),
            ModelRole(
                "reward",
                self.required_path("reward_model_path"),
                "rewards",
                self.config.reward_model_name,
                draws=False,
            ),
        )

    def check_models(self, fingerprints: Mapping[str, str]) -> None:
        if fingerprints["reward"] == fingerprints["instruct"]:
            raise ConfigError(
                f"reward_model_path {self.config.reward_model_path} is the instruct model itself; "
                "a reward is the difference of the two models' log-probs, which would be rounding "
                "noise: give a DPO-trained descendant of the instruct model"
            )

    def settings(self, stage: Stage) -> dict[str, Any]:
        return {"beta": self.config.beta} if stage == "rewards" else {}

    def rewards(
        self,
        engines: Mapping[str, Engine],
        samples: Sequence[tuple[Sample, SampleRollouts]],
    ) -> Iterator[SampleRewards | Failure]:
        from stream_engine.engine import RequestFailure, ScoreRequest
        from stream_engine.errors import RecordError

        engine = engines["reward"]
        by_key = {sample.key: (sample, rollouts) for sample, rollouts in samples}
        refused: list[Failure] = []

        def failure(key: str, reason: str, detail: str) -> Failure:
            idx = by_key[key][0].idx
            return Failure(reason=reason, detail=detail, stage="rewards", key=key, idx=idx)

        def requests() -> Iterator[ScoreRequest]:
            questions = ((s.key, s.question, s.images) for s, _ in samples)
            for key, prompt in engine.prepare(questions):
                rollouts = by_key[key][1]
                if isinstance(prompt, RecordError):
                    refused.append(failure(key, prompt.reason, prompt.detail))
                elif prompt.digest.tokenizer != rollouts.prompt.tokenizer:
                    raise ConfigError(
                        "instruct and reward model have different tokenizers; their log-probs "
                        "cannot be subtracted: give a DPO-trained descendant of the instruct model"
                    )
                elif prompt.digest != rollouts.prompt:
                    refused.append(
                        failure(key, "prompt_mismatch", "the models see other prompts or pixels")
                    )
                else:
                    scorable = [tuple(a.scored_ids) for a in rollouts.answers if a.scored_ids]
                    yield ScoreRequest(key, prompt, tuple(scorable))

        for result in engine.score(requests()):
            if isinstance(result, RequestFailure):
                yield failure(result.key, result.reason, result.detail)
            elif not result.is_finite:
                # NaN has no order: as a score it would make pairs of answers at random.
                detail = "the reward model computed NaN or infinity; try --dtype float32"
                yield failure(result.key, "nonfinite_logits", detail)
            else:
                _, rollouts = by_key[result.key]
                yield _rewards(rollouts, result.token_logps, self.config.beta)
        yield from refused

    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        config = self.config
        return rank_by_reward(
            sample.answers,
            rewards,
            rank=config.rank,
            distance=config.distance,
            strict_follow_rank=config.strict_follow_rank,
            similarity_threshold=config.similarity_threshold,
            compat=config.compat,
        )


def _rewards(
    rollouts: SampleRollouts, token_logps: Sequence[Sequence[float]], beta: float
) -> SampleRewards:
    """Scores of one sample's answers from the reward model's log-probs of their scored ids."""
    scored = [answer for answer in rollouts.answers if answer.scored_ids]
    empty = [answer.index for answer in rollouts.answers if not answer.scored_ids]
    return SampleRewards(
        key=rollouts.key,
        scores=[_score(answer, logps, beta) for answer, logps in zip(scored, token_logps)],
        unscored={"no_tokens": empty} if empty else {},
    )


def _score(answer: Answer, reward_logps: Sequence[float], beta: float) -> AnswerScore:
    """The implicit reward of one answer: its sum orders, `avg`, `min` and `orm` ride along."""
    instruct_logps = answer.scored_logps
    assert len(reward_logps) == len(instruct_logps)
    rewards = [beta * (r - i) for r, i in zip(reward_logps, instruct_logps)]
    total = sum(rewards)
    return AnswerScore(
        index=answer.index,
        score=total,
        scores={
            "sum": total,
            "avg": total / len(rewards),
            "min": min(rewards),
            "orm": rewards[-1],
        },
        token_logps=list(reward_logps),
    )
