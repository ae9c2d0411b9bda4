"""TRL's rows: conversational, in parquet, with images.

trl         prompt, chosen, rejected         DPOTrainer
trl_reward  chosen, rejected                 RewardTrainer; the prompt stands in both
trl_kto     prompt, completion, label        KTOTrainer
trl_sft     prompt, completion               SFTTrainer, on the best answers alone
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

from stream_engine.outputs.formats.base import (
    ANSWER_EXTRAS,
    EXTRAS,
    PairRow,
    ParquetExport,
    RankedAnswer,
    RankedRow,
    Ranking,
    answer_extras,
    extras,
)
from stream_engine.outputs.formats.prompt import embedded_images, marked_question, question_parts
from stream_engine.outputs.parquet import BOOL, IMAGE, STRING
from stream_engine.records import Answer, Sample

TURNS = [{"role": STRING, "content": [{"type": STRING, "text": STRING}]}]
PLAIN_TURNS = [{"role": STRING, "content": STRING}]


class TrlExport(ParquetExport):
    """TRL's conversational preference format; any number of images, none included.

    The ids that TRL's own collator makes of a row are those that the model was asked, for each
    architecture of transformers that is tested (tests/outputs/test_same_prompt_trl.py).
    """

    features: ClassVar[dict[str, Any]] = {
        "images": [IMAGE],
        "prompt": TURNS,
        "chosen": TURNS,
        "rejected": TURNS,
        **EXTRAS,
    }

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        return {
            "images": embedded_images(row.sample),
            "prompt": prompt_of(row.sample),
            "chosen": reply(row.chosen),
            "rejected": reply(row.rejected),
            **extras(row),
        }


class TrlRewardExport(ParquetExport):
    """TRL's preference format with the prompt in both conversations.

    Turns are plain texts, since TRL's trainer of reward models reads no pictures; a mark stands for
    each of them in the question. There is no column `margin`, which that trainer would put into its
    loss.
    """

    features: ClassVar[dict[str, Any]] = {
        "images": [IMAGE],
        "chosen": PLAIN_TURNS,
        "rejected": PLAIN_TURNS,
        **{name: feature for name, feature in EXTRAS.items() if name != "margin"},
    }

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        question = {"role": "user", "content": marked_question(row.sample)}
        columns = {
            "images": embedded_images(row.sample),
            "chosen": [question, {"role": "assistant", "content": row.chosen.text}],
            "rejected": [question, {"role": "assistant", "content": row.rejected.text}],
            **extras(row),
        }
        return {name: columns[name] for name in cls.features}


class TrlKtoRanking(Ranking):
    """TRL's unpaired preferences: of each question the best `rank` answers that may be examples
    are labelled true, the worst `rank` false, those between are left out.

    No answer is both, and each that is true was scored higher than each that is false.
    """

    holds = "labelled answers"
    features: ClassVar[dict[str, Any]] = {
        "images": [IMAGE],
        "prompt": TURNS,
        "completion": TURNS,
        "label": BOOL,
        **ANSWER_EXTRAS,
    }

    def to_rows(self, row: RankedRow) -> tuple[list[dict[str, Any]], Counter[str]]:
        good, bad = best_and_worst(row.fit, self.rank)
        rows = [
            completion_row(row, one, {"label": label})
            for label, labelled in ((True, good), (False, bad))
            for one in labelled
        ]
        return rows, left_out(row, [*good, *bad], otherwise="unlabelled")


class TrlSftRanking(Ranking):
    """TRL's prompts and completions: the `best` answers of each question that may be examples and
    were not cut off (rejection sampling)."""

    holds = "best answers"
    features: ClassVar[dict[str, Any]] = {
        "images": [IMAGE],
        "prompt": TURNS,
        "completion": TURNS,
        **ANSWER_EXTRAS,
    }

    def to_rows(self, row: RankedRow) -> tuple[list[dict[str, Any]], Counter[str]]:
        whole = [one for one in row.fit if one.answer.finish_reason == "stop"]
        best = whole[: self.best]
        rows = [completion_row(row, one, {}) for one in best]
        dropped = left_out(row, best, otherwise="not_among_best")
        num_cut = len(row.fit) - len(whole)
        dropped += Counter(cut_off=num_cut)
        dropped -= Counter(not_among_best=num_cut)
        return rows, dropped


def best_and_worst(
    answers: list[RankedAnswer], rank: int
) -> tuple[list[RankedAnswer], list[RankedAnswer]]:
    """The first and the last `rank` of answers that stand best first, without those between which
    the scores do not decide."""
    rank = min(rank, len(answers) // 2)
    good, bad = answers[:rank], answers[len(answers) - rank :]
    ties = {one.rank for one in good} & {one.rank for one in bad}
    return [a for a in good if a.rank not in ties], [a for a in bad if a.rank not in ties]


def left_out(row: RankedRow, taken: list[RankedAnswer], *, otherwise: str) -> Counter[str]:
    """The answers that are not taken: those that are no examples by their reason."""
    indices = {one.answer.index for one in taken}
    others = (one for one in row.answers if one.answer.index not in indices)
    return Counter(one.unfit or otherwise for one in others)


def completion_row(row: RankedRow, one: RankedAnswer, more: dict[str, Any]) -> dict[str, Any]:
    """A question and one answer as TRL's prompt and completion."""
    return {
        "images": embedded_images(row.sample),
        "prompt": prompt_of(row.sample),
        "completion": reply(one.answer),
        **more,
        **answer_extras(row, one),
    }


def prompt_of(sample: Sample) -> list[dict[str, Any]]:
    """The question as the user's turn, a part for each picture."""
    content = [
        {"type": "image" if part is None else "text", "text": part}
        for part in question_parts(sample)
    ]
    return [{"role": "user", "content": content}]


def reply(answer: Answer) -> list[dict[str, Any]]:
    """An answer as the assistant's turn."""
    return [{"role": "assistant", "content": [{"type": "text", "text": answer.text}]}]
