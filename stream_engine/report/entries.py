"""What a person wants to see of one pair: the answers of its question, scores, and why.

An entry is plain data, the same for the page and the terminal. Which parts it has is told by the
records alone: log-probs per token, facts, comparisons; a pipeline's name is not asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import dropwhile
from typing import Any

import msgspec

from stream_engine.pipelines.ranking import count_words
from stream_engine.records import (
    Answer,
    AnswerScore,
    PreferencePair,
    Sample,
    SampleRewards,
    SampleRollouts,
    prompt_parts,
)
from stream_engine.report.difference import Segment, difference

MAX_SHOWN = 20_000
"""Characters of a text on a page; a longer one is cut, and says so."""
MAX_HEAT_TOKENS = 2_000

Pieces = Callable[[Sequence[int]], list[str]]


class ShownAnswer(msgspec.Struct, kw_only=True):
    """One of the k answers. Rank 1 is the best; none without a score."""

    index: int
    text: str
    words: int
    tokens: int
    finish: str
    origin: str = ""
    """Of an answer that the input brought: who wrote it, and its side of a pair made before."""
    score: float | None = None
    rank: int | None = None
    scores: dict[str, float] = {}
    unscored: str = ""
    facts: list[dict[str, Any]] = []
    same_as: int | None = None
    details: str = ""


class HeatToken(msgspec.Struct, array_like=True):
    """One token of an answer with its log-probs under the reward and the instruct model."""

    text: str
    reward: float
    instruct: float


class Side(msgspec.Struct, kw_only=True):
    """The chosen or the rejected answer of a pair."""

    index: int
    segments: list[Segment]
    heat: list[HeatToken] = []


class Critique(msgspec.Struct, kw_only=True):
    """What a critic said of two answers in one order."""

    first: int
    second: int
    verdict: str
    reply: str = ""


class ShownPicture(msgspec.Struct, kw_only=True):
    """A picture's file, relative to the page, and its size there in pixels."""

    file: str
    width: int
    height: int


class Entry(msgspec.Struct, kw_only=True):
    """A pair, a question without one, or a sample that was set aside."""

    id: str
    key: str
    idx: str
    source: str
    fate: str
    question: str
    tags: list[str] = []
    round: int | None = None
    """In a run of several."""
    detail: str = ""
    margin: float | None = None
    chosen: Side | None = None
    rejected: Side | None = None
    answers: list[ShownAnswer] = []
    critiques: list[Critique] = []
    """Of the pair's two answers, with the critic's words."""
    verdicts: list[tuple[int, int, str]] = []
    """Of all comparisons: first, second, verdict."""
    is_flip: bool = False
    pictures: list[ShownPicture] = []
    unread: dict[str, str] = {}


def pair_id(key: str, pair: PreferencePair | None) -> str:
    """The name of a pair in links and commands, the same in every report of a run."""
    return key if pair is None else f"{key}-{pair.chosen}-{pair.rejected}"


def entry_of(
    sample: Sample,
    rollouts: SampleRollouts,
    rewards: SampleRewards,
    pair: PreferencePair | None,
    *,
    fate: str,
    pieces: Pieces | None = None,
) -> Entry:
    """The entry of a pair, or of a question whose answers made none.

    `pieces` are the instruct model's tokens as text; without it they are shown as numbers.
    """
    entry = Entry(
        id=pair_id(sample.key, pair),
        key=sample.key,
        idx=cut(sample.idx),
        source=source_of(sample),
        fate=fate,
        question=shown_question(rollouts.asked or sample.question, len(sample.images)),
        answers=shown_answers(rollouts, rewards),
        unread={name: cut(reply) for name, reply in rewards.details.get("unread", {}).items()},
    )
    comparisons = rewards.details.get("comparisons", [])
    entry.verdicts = [(c["first"], c["second"], c["verdict"]) for c in comparisons]
    if pair is not None:
        add_pair(entry, rollouts, rewards, pair, pieces)
        entry.critiques, entry.is_flip = critiques_of(comparisons, pair)
    return entry


def set_aside_entry(sample: Sample, reason: str, detail: str) -> Entry:
    """The entry of a sample that a stage set aside; its question as it is, marks and all."""
    return Entry(
        id=sample.key,
        key=sample.key,
        idx=cut(sample.idx),
        source=source_of(sample),
        fate=reason,
        question=cut(sample.question),
        detail=cut(detail),
    )


def shown_question(question: str, num_images: int) -> str:
    """A question, with the numbers of its pictures where they stand inside the text."""
    parts = prompt_parts(question, num_images)
    text = list(dropwhile(lambda part: part is None, parts))
    number = len(parts) - len(text)
    shown = []
    for part in text:
        number += part is None
        shown.append(f"[picture {number}]" if part is None else part)
    return cut("".join(shown))


def add_pair(
    entry: Entry,
    rollouts: SampleRollouts,
    rewards: SampleRewards,
    pair: PreferencePair,
    pieces: Pieces | None,
) -> None:
    """Both sides of the pair, with their difference and their tokens."""
    answers = {answer.index: answer for answer in rollouts.answers}
    scores = {score.index: score for score in rewards.scores}
    texts = [cut(answers[index].text) for index in (pair.chosen, pair.rejected)]
    entry.chosen, entry.rejected = (
        Side(
            index=index,
            segments=segments,
            heat=heat_of(answers[index], scores[index], pieces),
        )
        for index, segments in zip((pair.chosen, pair.rejected), difference(*texts))
    )
    entry.margin = pair.margin


def shown_answers(rollouts: SampleRollouts, rewards: SampleRewards) -> list[ShownAnswer]:
    """All answers, best first, those without a score last."""
    ordered = sorted(rewards.scores, key=lambda score: (-score.score, score.index))
    ranks = {score.index: (number, score) for number, score in enumerate(ordered, start=1)}
    unscored = {i: reason for reason, indices in rewards.unscored.items() for i in indices}
    shown = []
    for answer in rollouts.answers:
        one = ShownAnswer(
            index=answer.index,
            text=cut(answer.text),
            words=count_words(answer.text),
            tokens=len(answer.token_ids),
            finish=answer.finish_reason,
            origin=origin_of(answer),
        )
        if answer.index in ranks:
            one.rank, score = ranks[answer.index]
            one.score, one.scores = score.score, score.scores
            one.same_as = score.details.get("same_text_as")
            one.facts = score.details.get("facts", [])
            others = {k: v for k, v in score.details.items() if k not in ("same_text_as", "facts")}
            one.details = cut(msgspec.json.encode(others).decode()) if others else ""
        else:
            one.unscored = unscored.get(answer.index, "no score")
        shown.append(one)
    facts = {one.index: one.facts for one in shown}
    for one in shown:
        one.facts = facts.get(one.same_as, []) if one.same_as is not None else one.facts
    return sorted(shown, key=lambda one: (one.rank is None, one.rank or 0, one.index))


def origin_of(answer: Answer) -> str:
    """Where an answer that was not sampled here comes from, in words; empty for the others."""
    if not answer.ids_from_text:
        return ""
    by = f" by {cut(answer.model)}" if answer.model else ""
    given = f", given as {answer.given_as}" if answer.given_as else ""
    return f"brought along{by}{given}"


def heat_of(answer: Answer, score: AnswerScore, pieces: Pieces | None) -> list[HeatToken]:
    """The answer's tokens with both log-probs; none where the reward model gave none."""
    token_ids = answer.scored_ids[:MAX_HEAT_TOKENS]
    if not token_ids or len(score.token_logps) != len(answer.scored_ids):
        return []
    texts = pieces(token_ids) if pieces else [f"#{token_id} " for token_id in token_ids]
    base = score.details.get("base_token_logps", answer.scored_logps)
    return list(map(HeatToken, texts, score.token_logps, base))


def critiques_of(
    comparisons: Sequence[dict[str, Any]], pair: PreferencePair
) -> tuple[list[Critique], bool]:
    """The critic's words on a pair in both orders, and whether it named one place in both."""
    found = {(c["first"], c["second"]): c for c in comparisons}
    orders = ((pair.chosen, pair.rejected), (pair.rejected, pair.chosen))
    critiques = [
        Critique(
            first=order[0],
            second=order[1],
            verdict=found[order]["verdict"],
            reply=cut(found[order]["reply"]),
        )
        for order in orders
        if order in found
    ]
    verdicts = {critique.verdict for critique in critiques}
    is_flip = len(critiques) == 2 and (verdicts == {"first"} or verdicts == {"second"})
    return critiques, is_flip


def source_of(sample: Sample) -> str:
    """The data source that a sample names; "" where it names none."""
    return cut(sample.ds_name or sample.origin_dataset)


def cut(text: str, limit: int = MAX_SHOWN) -> str:
    """A text, or its beginning and how much more there is."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} [... {len(text) - limit:,} more characters]"
