"""Several questions about one picture: what their prompts begin with is prefilled once.

A prompt is cut by token ids, after it was tokenised as a whole: the prefix is the longest run of
ids that all prompts begin with, and each question keeps the rest as tokens of its own. A causal
model computes the same for prefix and rest as for the whole prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from typing import TYPE_CHECKING

from stream_engine.errors import RecordError
from stream_engine.models.base import IMAGE_SLOT, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image

    from stream_engine.engine.runner import ModelRunner


@dataclass(frozen=True)
class SharedPrompt:
    """A prefix and, for each question, its own tokens after it or why it cannot be asked.

    `prompt.digest` is that of the first question's whole prompt.
    """

    prompt: Prompt
    suffixes: list[tuple[int, ...] | RecordError]


def shared_prefix(
    prompts: Sequence[Prompt], image_ids: Collection[int] = ()
) -> tuple[Prompt, list[tuple[int, ...]]]:
    """Cut prompts about the same images into their common prefix and the rest of each.

    Every rest has at least one token. `image_ids` are token ids that stand for image features,
    beside IMAGE_SLOT.

    Raises:
        RecordError: "no_shared_prefix", when the prompts differ from the start, or before or
            inside the image.
    """
    first, ids = prompts[0], [prompt.ids for prompt in prompts]
    pairs = zip(min(ids), max(ids))  # in lexicographic order what these two share, all share
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    length = min(common, min(map(len, ids)) - 1)
    suffixes = [tuple(row[length:]) for row in ids]
    if length < 1 or not {IMAGE_SLOT, *image_ids}.isdisjoint(chain.from_iterable(suffixes)):
        raise RecordError("no_shared_prefix", f"prompts differ at position {length}")
    prefix = replace(first, ids=first.ids[:length])
    prefix.next_position = first.next_position - (len(first) - length)
    return prefix, suffixes


def share_prompt(
    runner: ModelRunner, questions: Sequence[str], images: Sequence[Image]
) -> SharedPrompt:
    """The questions as one prefix and their own tokens, each checked against the model's limits.

    Raises:
        RecordError: when no question can be asked, with the first one's reason.
    """
    prompts: list[Prompt | RecordError] = []
    for question in questions:
        try:
            prompts.append(runner.model.ask_plainly(question, images))
        except RecordError as error:
            prompts.append(error)
    whole = [prompt for prompt in prompts if isinstance(prompt, Prompt)]
    if not whole:
        raise next(error for error in prompts if isinstance(error, RecordError))
    prefix, rests = shared_prefix(whole, runner.model.suppressed_token_ids)
    following = iter(rests)
    return SharedPrompt(
        prefix,
        [
            prompt if isinstance(prompt, RecordError) else _checked(runner, prefix, next(following))
            for prompt in prompts
        ],
    )


def _checked(
    runner: ModelRunner, prefix: Prompt, suffix: tuple[int, ...]
) -> tuple[int, ...] | RecordError:
    refusal = runner.refusal(prefix, len(suffix))
    return suffix if refusal is None else RecordError(*refusal)
