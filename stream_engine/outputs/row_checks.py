"""What each format's trainer accepts of a row: one check a format, whose problems are sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from stream_engine.config import InputConfig
from stream_engine.errors import RecordError
from stream_engine.outputs.published import unreadable
from stream_engine.store import files
from stream_engine.store.base import Location
from stream_engine.text import reading

ROLES = frozenset(("user", "assistant", "system"))

Row = dict[str, Any]
Check = Callable[[Row, Location], Iterator[str]]
"""(row, the dataset's folder) -> the row's problems."""


def rlaifv_problems(row: Row, _folder: Location) -> Iterator[str]:
    """RLAIF-V: texts, one image, and log-probs of which the trainer unpacks six."""
    yield from text_problems(row["question"], row["chosen"], row["rejected"])
    if row["idx"] is None:
        yield "idx is null"
    if row["image"] is None or not row["image"]["bytes"]:
        yield "no image bytes"
    else:
        yield from image_problems(row["image"]["bytes"])
    if row.get("logps") is not None:
        logps = json.loads(row["logps"])["logps"]
        if len(logps) != 6:
            yield f"logps holds {len(logps)} values, not 6"
            return
        numbers = [logps[0], logps[1], *logps[2], logps[3], logps[4], *logps[5]]
        if not all(isinstance(n, int | float) and math.isfinite(n) and n <= 0 for n in numbers):
            yield "logps holds values that are no log-probs"


def trl_problems(row: Row, _folder: Location) -> Iterator[str]:
    """TRL's conversational preference rows with images."""
    question, chosen, rejected = (said(row[name]) for name in ("prompt", "chosen", "rejected"))
    yield from text_problems(question, chosen, rejected)
    yield from turn_problems(row, ("prompt", "chosen", "rejected"))


def trl_completion_problems(row: Row, _folder: Location) -> Iterator[str]:
    """TRL's prompts and completions with images, with a label or without."""
    for name in ("prompt", "completion"):
        yield from one_text_problems(name, said(row[name]))
    yield from turn_problems(row, ("prompt", "completion"))
    if "label" in row and not isinstance(row["label"], bool):
        yield f"label is {row['label']!r}"


def trl_reward_problems(row: Row, folder: Location) -> Iterator[str]:
    """TRL's rows for reward models: both conversations begin with the one question."""
    for name in ("chosen", "rejected"):
        roles = [turn["role"] for turn in row[name]]
        if roles != ["user", "assistant"]:
            yield f"{name} has turns of {', '.join(roles)}"
            return
    (asked, chosen), (again, rejected) = row["chosen"], row["rejected"]
    if asked != again:
        yield "chosen and rejected answer two questions"
    yield from mark_problems(asked["content"], row["images"], folder)
    question = asked["content"].replace("<image>", "")
    yield from text_problems(question, chosen["content"], rejected["content"])


def ranked_problems(row: Row, folder: Location) -> Iterator[str]:
    """A question with all its answers: in order of their scores, a log-prob for each token."""
    yield from mark_problems(row["question"], row["images"], folder)
    yield from one_text_problems("question", row["question"].replace("<image>", ""))
    scores = [one["score"] for one in row["answers"] if one["score"] is not None]
    if scores != sorted(scores, reverse=True) or None in [
        one["rank"] for one in row["answers"][: len(scores)]
    ]:
        yield "the answers are not in order of their scores"
    for number, one in enumerate(row["answers"]):
        for name in ("token_logps", "reward_token_logps"):
            if one[name] and len(one[name]) != len(one["token_ids"]):
                num_ids = len(one["token_ids"])
                yield f"answer {number}: {len(one[name])} {name} of {num_ids} tokens"


def said(turns: list[Row]) -> str:
    """The texts of turns whose content is parts."""
    return "".join(part["text"] or "" for turn in turns for part in turn["content"])


def turn_problems(row: Row, names: tuple[str, ...]) -> Iterator[str]:
    """Roles, and image parts of the prompt, which are as many as the row's images."""
    parts = [part for message in row["prompt"] for part in message["content"]]
    if any("image" in part for part in parts):
        yield "a content part has a key 'image'"
    for name in names:
        for message in row[name]:
            if message["role"] not in ROLES:
                yield f"{name} has the role {message['role']!r}"
    if row["images"] is None:
        yield "images is null; a row without images has an empty list"
        return
    num_image_parts = sum(part["type"] == "image" for part in parts)
    if num_image_parts != len(row["images"]):
        yield f"{num_image_parts} image parts in the prompt, {len(row['images'])} images"
    for image in row["images"]:
        yield from image_problems(image["bytes"])


def text_problems(question: str, chosen: str, rejected: str) -> Iterator[str]:
    """Rules for texts that all formats share."""
    for name, text in (("question", question), ("chosen", chosen), ("rejected", rejected)):
        yield from one_text_problems(name, text)
    if reading(chosen or "") == reading(rejected or ""):
        yield "chosen and rejected are the same"


def one_text_problems(name: str, text: str) -> Iterator[str]:
    """A text has something in it, and no mark of a picture."""
    if not text or not reading(text):
        yield f"{name} is empty"
    elif "<image>" in text:
        yield f"{name} holds a literal <image>"


def image_problems(data: bytes) -> Iterator[str]:
    """Whether an image decodes to its last row."""
    from stream_engine.pictures import read_picture

    try:
        read_picture(data, InputConfig().max_image_pixels)
    except RecordError as error:
        yield f"image: {error}"


def ms_swift_problems(row: Row, folder: Location) -> Iterator[str]:
    """ms-swift: a user's and an assistant's turn, and as many image marks as images."""
    user, assistant = row["messages"]
    if (user["role"], assistant["role"]) != ("user", "assistant"):
        yield f"roles are {user['role']}, {assistant['role']}"
    yield from mark_problems(user["content"], row.get("images", []), folder)
    question = user["content"].replace("<image>", "")
    yield from text_problems(question, assistant["content"], row["rejected_response"])


def llama_factory_problems(row: Row, folder: Location) -> Iterator[str]:
    """LLaMA-Factory: one human turn, two gpt turns, and as many image marks as images."""
    (human,) = row["conversations"]
    roles = (human["from"], row["chosen"]["from"], row["rejected"]["from"])
    if roles != ("human", "gpt", "gpt"):
        yield f"turns are from {', '.join(roles)}"
    yield from mark_problems(human["value"], row.get("images", []), folder)
    question = human["value"].replace("<image>", "")
    yield from text_problems(question, row["chosen"]["value"], row["rejected"]["value"])


def mark_problems(
    prompt: str, images: list[str | dict[str, Any]], folder: Location
) -> Iterator[str]:
    """Image marks and images match in number, and the images are there: inside, or as files."""
    if prompt.count("<image>") != len(images):
        yield f"{prompt.count('<image>')} image marks in the prompt, {len(images)} images"
    for image in images:
        if isinstance(image, dict):
            yield from image_problems(image["bytes"])
            continue
        try:
            data = files.read_bytes(folder / image)
        except OSError as error:
            yield f"{image}: {unreadable(error)}"
            continue
        if data is None:
            yield f"{image}: No such file or directory"
            continue
        yield from (f"{image}: {problem}" for problem in image_problems(data))


CHECKS: dict[str, Check] = {
    "rlaifv": rlaifv_problems,
    "trl": trl_problems,
    "trl_reward": trl_reward_problems,
    "trl_kto": trl_completion_problems,
    "trl_sft": trl_completion_problems,
    "ranked": ranked_problems,
    "ms_swift": ms_swift_problems,
    "llama_factory": llama_factory_problems,
    "ms_swift_jsonl": ms_swift_problems,
    "llama_factory_jsonl": llama_factory_problems,
}
