"""RLAIF-V's parquet, with the reference model's log-probs."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from stream_engine.outputs.formats.base import SCORES, PairRow, ParquetExport, scores
from stream_engine.outputs.formats.prompt import question_parts
from stream_engine.outputs.parquet import IMAGE, INT, STRING, Part, write_empty
from stream_engine.records import Answer, without_marks

LOGP_DIGITS = 6  # of the per-token log-probs in the logps column


class RlaifvExport(ParquetExport):
    """RLAIF-V's columns, `logps` and the scores. Its trainer reads exactly one image a row.

    `logps` is a JSON string {"logps": [chosen sum, chosen mean, chosen per token, the same three
    of rejected]}: log-probs of the instruct model, untempered, over the answer's tokens and the
    end token where it was generated. The lists per token are aligned as the trainer's own pass
    aligns them: entry t belongs to token t + 1 of prompt and answer, so they begin with a zero
    for each prompt position but the first (the trainer masks these), and end with a zero in place
    of an end token that was not generated (the trainer appends one to every answer).
    """

    features: ClassVar[dict[str, Any]] = {
        "ds_name": STRING,
        "image": IMAGE,
        "question": STRING,
        "chosen": STRING,
        "rejected": STRING,
        "origin_dataset": STRING,
        "origin_split": STRING,
        "idx": STRING,
        "image_path": STRING,
        "logps": STRING,
        **SCORES,
        "round": INT,
    }
    needs_logps: ClassVar[bool] = True
    marker = "train-logps.parquet"
    """A file without rows: the trainer uses stored log-probs if a file name has `logp` in it."""

    @classmethod
    def to_row(cls, row: PairRow) -> dict[str, Any] | str:
        if len(row.sample.images) != 1:
            return "needs_one_image"
        if not (row.chosen.token_ids and row.rejected.token_ids):
            return "no_logps"  # of a --sampler without the instruct model
        first, *others = question_parts(row.sample)
        if first is not None or None in others:
            return "inline_image_mark"  # the trainer puts the image in front, whatever is asked
        image = row.sample.images[0]
        return {
            "ds_name": row.sample.ds_name or "stream_engine",
            "image": {"bytes": image.data, "path": image.path},
            "question": without_marks(row.sample.question),
            "chosen": row.chosen.text,
            "rejected": row.rejected.text,
            "origin_dataset": row.sample.origin_dataset,
            "origin_split": row.sample.origin_split,
            "idx": row.sample.idx,
            "image_path": row.sample.image_path or image.path,
            "logps": logps_json(row),
            **scores(row),
            "round": row.round,
        }

    def close(self) -> list[Part]:
        write_empty(self.folder / self.marker, self.schema)
        return super().close()


def logps_json(row: PairRow) -> str:
    """The `logps` column: see RlaifvExport."""
    return msgspec.json.encode(
        {
            "logps": [
                *answer_logps(row.chosen, row.num_prompt_tokens),
                *answer_logps(row.rejected, row.num_prompt_tokens),
            ]
        }
    ).decode()


def answer_logps(answer: Answer, num_prompt_tokens: int) -> tuple[float, float, list[float]]:
    """Sum, mean and per-token list of an answer's reference log-probs."""
    logps = answer.scored_logps
    total = sum(logps)
    per_token = [0.0] * max(0, num_prompt_tokens - 1)
    per_token += [round(logp, LOGP_DIGITS) for logp in logps]
    if answer.end_logp is None:
        per_token.append(0.0)
    return total, total / max(1, len(logps)), per_token
