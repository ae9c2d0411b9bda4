"""divide_and_conquer: an answer loses a point for every fact in it that the picture denies.

    split            answer -> facts                         text model, sampled
    question_change  facts -> one yes/no question each       text model, sampled
    auto_check       question + image -> p(yes), p(no)       VLM, one forward, nothing sampled

score = -(number of denied facts), as in RLAIF-V (Yu et al. 2024, section 3.2). A fact carries its
question and its verdict with it from step to step, so that they cannot be mispaired. Answers with
the same text are judged once; so are questions that several answers raise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import msgspec

from stream_engine.config import ModelRole, SamplingConfig, Stage
from stream_engine.errors import ConfigError, RecordError
from stream_engine.pipelines.asking import Ask, Replies, Reply, ask, ask_server, failure_of
from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.bullets import parse_bullets, without_last_line
from stream_engine.pipelines.prompts import rewrite_prompt, split_prompt, yes_no_prompt
from stream_engine.pipelines.ranking import rank_by_denied_facts, rank_by_wins
from stream_engine.pipelines.yes_no import YesNo, yes_no_of_texts, yes_no_tokens
from stream_engine.records import (
    AnswerScore,
    Failure,
    PreferencePair,
    Sample,
    SampleRewards,
    SampleRollouts,
)

if TYPE_CHECKING:
    from stream_engine.engine import Engine, ScoreRequest
    from stream_engine.remote import ServerModel

REWARD_ROLES = ("auto_check", "question_change", "split")
"""In the order of --reward_model_path."""


class DivideAndConquerOptions(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True
):
    """How the two text models write. The defaults are those of RLAIF-V."""

    text_temperature: float = 0.2
    """Temperature of the split and question models."""
    text_top_p: float = 0.9
    """top_p of the split and question models."""
    text_max_new_tokens: int = 256
    """Longest list of facts or questions, in tokens."""
    fact_pairs: Literal["drawn", "ranked"] = "drawn"
    """drawn: two of the pairs that are a denied fact apart, by lot; ranked: as llava_critic pairs,
    any of the best --rank with any of the worst, the widest margins first, or those of equal place
    with --strict_follow_rank."""


@dataclass
class Fact:
    """One sentence of an answer, with what became of it."""

    text: str
    question: str = ""
    verdict: YesNo | None = None


@dataclass
class Case:
    """One sample on its way through the three steps.

    `facts` and `copies` go by the first answer of each text; `copies` lists all answers with it.
    `unread` keeps replies that were no list of the right length, by what was asked. `error` sets
    the whole sample aside.
    """

    sample: Sample
    rollouts: SampleRollouts
    copies: dict[int, list[int]] = field(default_factory=dict)
    facts: dict[int, list[Fact]] = field(default_factory=dict)
    unscored: dict[str, list[int]] = field(default_factory=dict)
    judge: Counter[str] = field(default_factory=Counter)
    outside_mass: float = 0.0
    unread: dict[str, str] = field(default_factory=dict)
    error: RecordError | None = None

    def __post_init__(self) -> None:
        first: dict[str, int] = {}
        for answer in self.rollouts.answers:
            self.copies.setdefault(first.setdefault(answer.text, answer.index), []).append(
                answer.index
            )
        self.judge["answers"] = len(self.rollouts.answers)

    def drop(self, index: int, reason: str) -> None:
        """Leave an answer, and those with its text, without a score."""
        self.facts.pop(index, None)
        self.unscored.setdefault(reason, []).extend(self.copies[index])

    def count(self, name: str, index: int) -> None:
        """Count an answer, and those with its text."""
        self.judge[name] += len(self.copies[index])

    def give_up(self, index: int, reason: str, name: str, reply: Reply | RecordError) -> None:
        """Drop an answer, and count it, since a reply is not what was asked for."""
        self.drop(index, reason)
        self.count(reason, index)
        self.unread[name] = reply.text if isinstance(reply, Reply) else str(reply)

    def questions(self) -> list[str]:
        """The questions of all facts, each once."""
        return list(dict.fromkeys(f.question for facts in self.facts.values() for f in facts))

    def outcome(self) -> SampleRewards | Failure:
        """The scores, once every fact has its verdict, or why the sample is set aside."""
        if self.error is not None:
            return failure_of(self.sample, self.error)
        scores = []
        for index, facts in self.facts.items():
            denied = sum(not verdict_of(fact).holds for fact in facts)
            details = {"facts": [fact_details(fact) for fact in facts]}
            for copy in self.copies[index]:
                scores.append(
                    AnswerScore(
                        index=copy,
                        score=float(-denied),
                        scores={"facts": len(facts), "denied": denied},
                        details=details if copy == index else {"same_text_as": index},
                    )
                )
                self.judge.update(answers_judged=1, facts=len(facts), facts_denied=denied)
        return SampleRewards(
            key=self.sample.key,
            scores=sorted(scores, key=lambda score: score.index),
            unscored={reason: sorted(indices) for reason, indices in self.unscored.items()},
            judge={**self.judge, "outside_mass": self.outside_mass},
            details={"unread": self.unread} if self.unread else {},
        )


class DivideAndConquerPipeline(Pipeline):
    """`instruct` draws; `split`, `question_change` and `auto_check` judge."""

    name: ClassVar[str] = "divide_and_conquer"
    Options: ClassVar[type[msgspec.Struct]] = DivideAndConquerOptions
    length_balance: ClassVar[Literal["mean", "ratio"] | None] = "ratio"
    needs_logps: ClassVar[bool] = False
    judge_rates: ClassVar[Mapping[str, tuple[str, str]]] = {
        "facts_per_answer": ("facts", "answers_judged"),
        "fraction_denied": ("facts_denied", "facts"),
        "outside_mass": ("outside_mass", "facts_checked"),
        "split_unparsed_rate": ("split_unparsed", "answers"),
        "no_facts_rate": ("no_facts", "answers"),
        "asked_again_rate": ("asked_again", "answers"),
        "question_mismatch_rate": ("question_count_mismatch", "answers"),
    }

    def roles(self) -> tuple[ModelRole, ...]:
        config, options = self.config, self.options
        paths = [path.strip() for path in self.required_path("reward_model_path").split(",")]
        if len(paths) != len(REWARD_ROLES) or not all(paths):
            raise ConfigError(
                f"{self.name} needs --reward_model_path {','.join(REWARD_ROLES)}: three paths, "
                f"not {config.reward_model_path!r}"
            )
        writing = SamplingConfig(
            temperature=options.text_temperature,
            top_p=options.text_top_p,
            max_new_tokens=options.text_max_new_tokens,
        )
        auto_check, question_change, split = paths
        return (
            *self.answer_roles(),
            ModelRole("split", split, "rewards", sampling=writing),
            ModelRole("question_change", question_change, "rewards", sampling=writing),
            ModelRole("auto_check", auto_check, "rewards", config.reward_model_name, draws=False),
        )

    def settings(self, stage: Stage) -> dict[str, Any]:
        if stage != "rewards":
            return {}
        return {k: v for k, v in msgspec.to_builtins(self.options).items() if k != "fact_pairs"}

    def rewards(
        self,
        engines: Mapping[str, Engine],
        samples: Sequence[tuple[Sample, SampleRollouts]],
    ) -> Iterator[SampleRewards | Failure]:
        seed = self.config.seed
        cases = [Case(sample, rollouts) for sample, rollouts in samples]
        split_answers(engines["split"], cases, seed=seed)
        write_questions(engines["question_change"], cases, seed=seed)
        check_facts(engines["auto_check"], cases, seed=seed)
        yield from (case.outcome() for case in cases)

    def candidate_pairs(
        self, sample: SampleRollouts, rewards: SampleRewards
    ) -> list[PreferencePair]:
        config = self.config
        if self.options.fact_pairs == "drawn" or config.compat:
            return rank_by_denied_facts(rewards, seed=config.seed)
        return rank_by_wins(rewards, rank=config.rank, strict_follow_rank=config.strict_follow_rank)


def split_answers(engine: Engine, cases: Sequence[Case], *, seed: int) -> None:
    """Fill `Case.facts`."""

    def questions(case: Case) -> dict[str, str]:
        texts = {answer.index: answer.text for answer in case.rollouts.answers}
        question = case.sample.question
        return {f"split/{i}": split_prompt(question, texts[i]) for i in case.copies}

    for case, replies in asked(engine, cases, questions, seed=seed):
        for index in case.copies:
            name = f"split/{index}"
            reply = replies[name]
            if isinstance(reply, RecordError):
                case.drop(index, reply.reason)
                continue
            if reply.is_cut:
                case.count("split_cut", index)
            sentences = read_list(reply)
            if sentences:
                case.facts[index] = [Fact(sentence) for sentence in sentences]
            elif sentences is None or reply.is_cut:
                case.give_up(index, "split_unparsed", name, reply)
            else:
                case.give_up(index, "no_facts", name, reply)


def write_questions(engine: Engine, cases: Sequence[Case], *, seed: int) -> None:
    """Fill `Fact.question`: an answer's facts at once and, where that fails, one by one."""

    def at_once(case: Case) -> dict[str, str]:
        return {
            f"questions/{index}": rewrite_prompt([fact.text for fact in facts])
            for index, facts in case.facts.items()
        }

    def one_by_one(case: Case) -> dict[str, str]:
        return {
            f"question/{index}/{number}": rewrite_prompt([fact.text])
            for index, facts in case.facts.items()
            for number, fact in enumerate(facts)
            if not fact.question
        }

    for case, replies in asked(engine, cases, at_once, seed=seed):
        for index, facts in case.facts.items():
            questions = read_list(replies[f"questions/{index}"])
            if questions is None or len(questions) != len(facts):
                case.count("asked_again", index)
                continue
            for fact, question in zip(facts, questions):
                fact.question = question

    for case, replies in asked(engine, cases, one_by_one, seed=seed):
        for name, reply in replies.items():
            index, number = map(int, name.split("/")[1:])
            questions = read_list(reply)
            if index not in case.facts:
                continue  # given up for another of its facts
            if questions is None or len(questions) != 1:
                case.give_up(index, "question_count_mismatch", name, reply)
            else:
                [case.facts[index][number].question] = questions


def asked(
    engine: Engine,
    cases: Sequence[Case],
    questions: Callable[[Case], dict[str, str]],
    *,
    seed: int,
) -> Iterator[tuple[Case, Replies]]:
    """The replies to every case's questions, if it has any; those that fail are marked."""
    by_key = {case.sample.key: case for case in cases if case.error is None}
    asks = [Ask(key, texts) for key, case in by_key.items() if (texts := questions(case))]
    for key, replies in ask(engine, asks, seed=seed):
        if isinstance(replies, RecordError):
            by_key[key].error = replies
        else:
            yield by_key[key], replies


def check_facts_on_server(server: ServerModel, cases: Sequence[Case], *, seed: int) -> None:
    """Fill `Fact.verdict` by the likeliest first tokens that a server tells.

    Raises:
        ConfigError: when it does not tell them.
    """
    by_key = {case.sample.key: case for case in cases if case.error is None and case.facts}
    asks = [
        Ask(key, {q: yes_no_prompt(q) for q in case.questions()}, case.sample.images)
        for key, case in by_key.items()
    ]
    for key, replies in ask_server(server, asks, seed=seed, wants_logps=True):
        if isinstance(replies, RecordError):
            by_key[key].error = replies
            continue
        verdicts = {}
        for question, reply in replies.items():
            if isinstance(reply, RecordError):
                continue
            if reply.top_logps is None:
                raise ConfigError(
                    f"auto_check: the server of {server.address.name} gives no top_logprobs, "
                    "without which yes and no have no probabilities: give it a checkpoint"
                )
            verdicts[question] = yes_no_of_texts(reply.top_logps)
        note_verdicts(by_key[key], verdicts)


def check_facts(engine: Engine | ServerModel, cases: Sequence[Case], *, seed: int) -> None:
    """Fill `Fact.verdict`."""
    from stream_engine.remote import ServerModel

    if isinstance(engine, ServerModel):
        check_facts_on_server(engine, cases, seed=seed)
        return
    from stream_engine.engine import RequestFailure, ScoreRequest

    tokens = yes_no_tokens(engine.model)
    by_key = {case.sample.key: case for case in cases if case.error is None and case.facts}
    open_questions = {key: case.questions() for key, case in by_key.items()}

    def requests() -> Iterator[ScoreRequest]:
        prompts = (
            (key, [yes_no_prompt(question) for question in questions], by_key[key].sample.images)
            for key, questions in open_questions.items()
        )
        for key, shared in engine.prepare_shared(prompts):
            if isinstance(shared, RecordError):
                by_key[key].error = shared
                continue
            fitting = {
                question: suffix
                for question, suffix in zip(open_questions[key], shared.suffixes)
                if not isinstance(suffix, RecordError)
            }
            open_questions[key] = list(fitting)
            yield ScoreRequest(key, shared.prompt, tuple(fitting.values()))

    for result in engine.next_token_logps(requests(), tokens.watched):
        case = by_key[result.key]
        if isinstance(result, RequestFailure):
            case.error = RecordError(result.reason, result.detail)
        elif not all(math.isfinite(logp) for row in result.logps for logp in row):
            case.error = RecordError("nonfinite_logits", "in the yes/no check")
        else:
            verdicts = [tokens.read(row) for row in result.logps]
            note_verdicts(case, dict(zip(open_questions[result.key], verdicts)))


def note_verdicts(case: Case, verdicts: Mapping[str, YesNo]) -> None:
    """Give every fact the verdict on its question; answers with a question too long are dropped."""
    case.judge["facts_checked"] = len(verdicts)
    case.outside_mass = sum(verdict.outside for verdict in verdicts.values())
    for index, facts in list(case.facts.items()):
        if all(fact.question in verdicts for fact in facts):
            for fact in facts:
                fact.verdict = verdicts[fact.question]
        else:
            case.drop(index, "prompt_too_long")


def read_list(reply: Reply | RecordError) -> list[str] | None:
    """The sentences of a reply, without a last line that was cut; None when it is no list."""
    if isinstance(reply, RecordError):
        return None
    return parse_bullets(without_last_line(reply.text) if reply.is_cut else reply.text)


def verdict_of(fact: Fact) -> YesNo:
    assert fact.verdict is not None, f"unchecked fact: {fact.text}"
    return fact.verdict


def fact_details(fact: Fact) -> dict[str, Any]:
    verdict = verdict_of(fact)
    return {
        "fact": fact.text,
        "question": fact.question,
        "holds": verdict.holds,
        "p_yes": round(verdict.yes, 6),
        "p_no": round(verdict.no, 6),
    }
