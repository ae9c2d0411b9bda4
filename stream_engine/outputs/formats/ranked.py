"""Every question with all its answers, best first: for best-of-n, and for trainers of one's own.

`stream-engine run` takes the rows as an input again, with their answers.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, ClassVar

import msgspec

from stream_engine.outputs.formats.base import ORIGIN, RankedAnswer, RankedRow, Ranking, origin
from stream_engine.outputs.formats.prompt import embedded_images, marked_question
from stream_engine.outputs.parquet import BOOL, FLOAT, IMAGE, INT, STRING

ANSWER: dict[str, Any] = {
    "text": STRING,
    "rank": INT,
    "score": FLOAT,
    "scores": STRING,
    "unfit": STRING,
    "model": STRING,
    "given_as": STRING,
    "finish_reason": STRING,
    "token_ids": [INT],
    "token_logps": [FLOAT],
    "reward_token_logps": [FLOAT],
    "ids_from_text": BOOL,
}


class RankedAnswers(Ranking):
    """A row a question, no answer left out.

    Of an answer, `rank` and `score` are null where it has no score; `unfit` is why trl_kto and
    trl_sft leave it out, or empty; `token_ids` end with the end token where there is one, and the
    log-probs are theirs, under the instruct model and, where the pipeline has them, the reward
    model.
    """

    holds = "questions with all their answers"
    holds_single_answers = False
    features: ClassVar[dict[str, Any]] = {
        "question": STRING,
        "images": [IMAGE],
        "answers": [ANSWER],
        **ORIGIN,
        "round": INT,
    }

    def to_rows(self, row: RankedRow) -> tuple[list[dict[str, Any]], Counter[str]]:
        columns = {
            "question": marked_question(row.sample),
            "images": embedded_images(row.sample),
            "answers": [columns_of(one) for one in row.answers],
            **origin(row.sample),
            "round": row.round,
        }
        return [columns], Counter()


def columns_of(one: RankedAnswer) -> dict[str, Any]:
    """One answer as ANSWER has it."""
    answer, score = one.answer, one.score
    return {
        "text": answer.text,
        "rank": one.rank,
        "score": None if score is None else float(score.score),
        "scores": msgspec.json.encode(score.scores if score else {}).decode(),
        "unfit": one.unfit,
        "model": answer.model,
        "given_as": answer.given_as,
        "finish_reason": answer.finish_reason,
        "token_ids": answer.scored_ids,
        "token_logps": answer.scored_logps,
        "reward_token_logps": score.token_logps if score else [],
        "ids_from_text": answer.ids_from_text,
    }
