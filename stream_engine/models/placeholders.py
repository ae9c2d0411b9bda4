"""Where pictures stand in a question, and which ids of a tokenised prompt their features fill."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stream_engine.errors import RecordError
from stream_engine.models.base import IMAGE_SLOT
from stream_engine.records import prompt_parts


def place_images(question: str, blocks: Sequence[str]) -> str:
    """The user's turn: each picture's block at its mark, or all of them in front, a line each."""
    parts = prompt_parts(question, len(blocks))
    if None not in parts[len(blocks) :]:
        return "\n".join([*blocks, parts[-1] or ""])
    following = iter(blocks)
    return "".join(next(following) if part is None else part for part in parts)


def fill_slots(
    ids: Sequence[int], *, starts: Collection[int], filler: int, length: int, num_blocks: int
) -> list[int]:
    """Put IMAGE_SLOT in place of the `length` fillers that follow each start token.

    Raises:
        RecordError: "image_placeholder", when that does not find `num_blocks` blocks, because the
            question itself spells the tokens that announce a picture.
    """
    filled, found = list(ids), 0
    for position, token in enumerate(ids):
        run = ids[position + 1 : position + 1 + length]
        if token in starts and len(run) == length and all(other == filler for other in run):
            filled[position + 1 : position + 1 + length] = [IMAGE_SLOT] * length
            found += 1
    if found != num_blocks:
        raise RecordError("image_placeholder", f"{found} image blocks for {num_blocks}")
    return filled
