"""dpo_reward: answers are scored by the implicit reward of a DPO-trained model.

For a reward model that DPO trained from the instruct model (Rafailov et al. 2023, eq. 5), up to a
term of the question alone,

    r(answer) = beta * (log p_reward(answer) - log p_instruct(answer))

per token over the answer and the end token when one was generated. The instruct half fell out of
generation; the reward model scores the very ids that were sampled, over one prefix a question.

Where the answers are another model's, as in later rounds of training, the reward is what the reward
model prefers beyond that one; a base of its own (--base_model_path), which scores the answers
likewise, stands in the instruct model's place.
"""

from __future__ import annotations

import os
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
    from stream_engine.engine import Engine, ScoredContinuations


class DPORewardPipeline(Pipeline):
    """Models of one family and tokenizer: `instruct` draws, `reward` scores, against what `base`
    scores where that is another than `instruct`."""

    name: ClassVar[str] = "dpo_reward"
    has_base: ClassVar[bool] = True

    def roles(self) -> tuple[ModelRole, ...]:
        if served(self.config.reward_model_path):
            raise ConfigError(
                f"{self.name} needs the reward model's log-probs of given answers, which chat "
                "completions do not tell: give --reward_model_path a checkpoint"
            )
        return (
            *self.answer_roles(),
            *self.base_roles(),
            ModelRole(
                "reward",
                self.required_path("reward_model_path"),
                "rewards",
                self.config.reward_model_name,
                draws=False,
            ),
        )

    def base_roles(self) -> tuple[ModelRole, ...]:
        """The base model, where it is another than the one that tells its log-probs anyway."""
        path, instruct = self.config.base_model_path, self.config.instruct_model_path
        if not path or (instruct and os.path.abspath(path) == os.path.abspath(instruct)):
            return ()
        if served(path):
            raise ConfigError(f"{self.name} needs log-probs: give --base_model_path a checkpoint")
        return (ModelRole("base", path, "rewards", draws=False),)

    def check_models(self, fingerprints: Mapping[str, str]) -> None:
        base = "base" if "base" in fingerprints else "instruct"
        if fingerprints["reward"] == fingerprints[base]:
            raise ConfigError(
                f"reward_model_path {self.config.reward_model_path} is the {base} model itself; "
                "a reward is the difference of the two models' log-probs, which would be rounding "
                f"noise: give a DPO-trained descendant of the {base} model"
            )

    def settings(self, stage: Stage) -> dict[str, Any]:
        return {"beta": self.config.beta} if stage == "rewards" else {}

    def rewards(
        self,
        engines: Mapping[str, Engine],
        samples: Sequence[tuple[Sample, SampleRollouts]],
    ) -> Iterator[SampleRewards | Failure]:
        by_key = {sample.key: (sample, rollouts) for sample, rollouts in samples}
        of_base: dict[str, Sequence[Sequence[float]]] = {}
        if "base" in engines:
            for found in scored(engines["base"], "base", samples):
                if isinstance(found, Failure):
                    yield found
                else:
                    of_base[found.key] = found.token_logps
            samples = [by_key[key] for key in by_key if key in of_base]
        for found in scored(engines["reward"], "reward", samples):
            if isinstance(found, Failure):
                yield found
            else:
                rollouts = by_key[found.key][1]
                base = of_base.get(found.key)
                yield _rewards(rollouts, found.token_logps, base, self.config.beta)

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


def scored(
    engine: Engine, role: str, samples: Sequence[tuple[Sample, SampleRollouts]]
) -> Iterator[ScoredContinuations | Failure]:
    """The log-probs of every sample's scored ids under one model, or why there are none."""
    from stream_engine.engine import RequestFailure, ScoreRequest
    from stream_engine.errors import RecordError

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
                    f"instruct and {role} model have different tokenizers; their log-probs cannot "
                    "be subtracted: give a DPO-trained descendant of the instruct model"
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
            detail = f"the {role} model computed NaN or infinity; try --dtype float32"
            yield failure(result.key, "nonfinite_logits", detail)
        else:
            yield result
    yield from refused


def _rewards(
    rollouts: SampleRollouts,
    token_logps: Sequence[Sequence[float]],
    base_logps: Sequence[Sequence[float]] | None,
    beta: float,
) -> SampleRewards:
    """Scores of one sample's answers from the reward model's log-probs of their scored ids, and the
    base model's where it is not the instruct model."""
    scorable = [answer for answer in rollouts.answers if answer.scored_ids]
    unscored: dict[str, list[int]] = {}
    for answer in rollouts.answers:
        if not answer.scored_ids:
            reason = "answer_too_long" if answer.text.strip() else "no_tokens"
            unscored.setdefault(reason, []).append(answer.index)
    base = base_logps or [answer.scored_logps for answer in scorable]
    scores = [_score(a, logps, b, beta) for a, logps, b in zip(scorable, token_logps, base)]
    if base_logps is not None:
        for score, logps in zip(scores, base_logps):
            score.details["base_token_logps"] = list(logps)
    return SampleRewards(key=rollouts.key, scores=scores, unscored=unscored)


def _score(
    answer: Answer, reward_logps: Sequence[float], base_logps: Sequence[float], beta: float
) -> AnswerScore:
    """The implicit reward of one answer: its sum orders, `avg`, `min` and `orm` ride along."""
    assert len(reward_logps) == len(base_logps)
    rewards = [beta * (r - b) for r, b in zip(reward_logps, base_logps)]
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
