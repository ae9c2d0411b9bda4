"""The typed records that flow through a run, and are stored in its result files.

    Sample ──rollouts──▶ SampleRollouts ──rewards──▶ SampleRewards ──rank──▶ PreferencePair
       │                     │                           │                       │
       └─────────────────────┴────── Failure ────────────┘                   dropped: reason

Foreign formats are converted to `Sample` once, by the reader. Fields are only ever added, with a
default; a change of meaning raises SCHEMA_VERSION.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any, Literal

import msgspec

SCHEMA_VERSION = 1

IMAGE_MARK = "<image>"
"""Where an image stands in a question, as LLaVA-style datasets write it."""
MEDIA_MARKS = ("<video>", "<audio>")
"""Where a video or a sound stands; trainers that work by marks refuse a row that spells one."""


class EncodedImage(msgspec.Struct, frozen=True):
    """An image as encoded bytes, the original's where that is upright; decoded when a batch needs
    it."""

    data: bytes
    path: str = ""


class GivenAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that came with its question, to be scored in place of sampled ones.

    `model` names who wrote it, where the input says so; `given_as` is its side of a pair that the
    input had made already, or "".
    """

    text: str
    model: str = ""
    given_as: Literal["", "chosen", "rejected"] = ""
    finish_reason: Literal["stop", "length"] = "stop"


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One question about zero or more images.

    `key` is 32 hex digits, `sample_key(idx, question, images, answers)`; `idx` is the user's own id
    as a string (the key where the input had none). `answers` are those that the input brought;
    without any they are sampled. The remaining fields are carried through.
    """

    key: str
    idx: str
    question: str
    images: tuple[EncodedImage, ...] = ()
    answers: tuple[GivenAnswer, ...] = ()
    ds_name: str = ""
    origin_dataset: str = ""
    origin_split: str = ""
    image_path: str = ""
    metainfos: str = ""


def without_marks(question: str) -> str:
    """A question without image marks, and without the white space that set them off."""
    if IMAGE_MARK not in question:
        return question
    if front := re.match(rf"\s*({IMAGE_MARK}\s*)+", question):
        question = question[front.end() :]
    # from behind, since a search for an end would try every blank of a long gap
    if back := re.match(rf"\s*({IMAGE_MARK[::-1]}\s*)+", question[::-1]):
        question = question[: len(question) - back.end()]
    return re.sub(rf"{IMAGE_MARK}\n?", "", question)


def marks_are_in_front(question: str) -> bool:
    """Whether a question's marks say no more than "pictures first": all before any text, or a
    single one behind all of it."""
    *before, last = question.split(IMAGE_MARK)
    return not any(map(str.strip, before)) or (len(before) == 1 and not last.strip())


def prompt_parts(question: str, num_images: int) -> list[str | None]:
    """The user's turn in order: texts, and None where a picture stands.

    Marks inside the text, one for each picture, are where the pictures stand; a question without
    marks has its pictures first. Readers let no other question through; of one that comes from
    elsewhere the marks are taken out. Models are asked in these parts and trainers are given them,
    so that both see the same tokens.
    """
    texts = question.split(IMAGE_MARK)
    if num_images and len(texts) == num_images + 1 and not marks_are_in_front(question):
        parts: list[str | None] = [part for text in texts for part in (text, None)][:-1]
        return [part for part in parts if part != ""]
    return [*([None] * num_images), without_marks(question)]


def carried_hash(sample: Sample) -> str:
    """Eight hex digits of what a sample carries through beside what is asked; "" for nothing."""
    carried = (sample.ds_name, sample.origin_dataset, sample.origin_split, sample.metainfos)
    if not any(carried):
        return ""
    return hashlib.blake2b(msgspec.json.encode(carried), digest_size=4).hexdigest()


def sample_key(
    idx: str,
    question: str,
    images: tuple[EncodedImage, ...],
    answers: tuple[GivenAnswer, ...] = (),
) -> str:
    """Content hash of a sample: BLAKE2b-128 over id, question, every image's bytes, and the answers
    that it brings, if it brings some."""
    digest = hashlib.blake2b(digest_size=16)
    brought = [msgspec.json.encode(answers)] if answers else []
    for part in (idx.encode(), question.encode(), *(image.data for image in images), *brought):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


FORWARD_ERROR = "forward_error"
"""The reason of a Failure whose record the model's own code could not stand."""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A record set aside: where it came from, and why. One line of a quarantine file."""

    reason: str
    detail: str = ""
    stage: str = "input"
    source: str = ""
    row: int = -1
    key: str = ""
    idx: str = ""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """One answer, sampled or brought along by the input.

    `token_ids` and `token_logps` hold the answer's tokens without the end token. Log-probs are
    natural logs of the untempered, unfiltered distribution in float32. `end_token_id` and
    `end_logp` are set only when the end token was generated (`finish_reason == "stop"`).

    Of an answer that the input brought the ids that were sampled are not known: they are made from
    its text (`ids_from_text`), the end token is put behind it unless it was cut off, and `model`
    and `given_as` are the input's. A sampled answer has none of these. One whose ids would not fit
    the instruct model has a text, but neither ids nor an end token.
    """

    index: int
    text: str
    token_ids: list[int]
    token_logps: list[float]
    finish_reason: str  # "stop" | "length"
    end_token_id: int | None = None
    end_logp: float | None = None
    model: str = ""
    given_as: Literal["", "chosen", "rejected"] = ""
    ids_from_text: bool = False

    @property
    def scored_ids(self) -> list[int]:
        """Answer tokens, then the end token when it was generated: what a reward model scores."""
        return self.token_ids if self.end_token_id is None else [*self.token_ids, self.end_token_id]

    @property
    def scored_logps(self) -> list[float]:
        """Log-probs of `scored_ids` under the instruct model."""
        return self.token_logps if self.end_logp is None else [*self.token_logps, self.end_logp]


class PromptDigest(msgspec.Struct, frozen=True):
    """What a model saw before the answer. Log-probs are subtracted only between equal digests."""

    ids: str  # hash of the expanded prompt ids
    pixels: str  # hash of the images' encoded bytes and of the preprocessing settings
    tokenizer: str  # hash of the vocabulary


class SampleRollouts(msgspec.Struct, frozen=True, kw_only=True):
    """Stage 0 for one sample: its answers, in order of `Answer.index`.

    `num_prompt_tokens` counts the positions before the first answer token, images expanded; the
    stored reference log-probs are aligned by it.
    """

    key: str
    prompt: PromptDigest
    answers: list[Answer]
    num_prompt_tokens: int = 0
    asked: str = ""
    """The question as the model was asked it, where that is not as the sample has it."""


class AnswerScore(msgspec.Struct, frozen=True, kw_only=True):
    """One answer's score. `score` orders the answers; higher is better.

    `scores` holds the named components (for dpo_reward: sum, avg, min, orm); `token_logps` the
    reward model's log-probs of `Answer.scored_ids` where the pipeline computes them; `details`
    whatever else a person wants to read (facts, verdicts, reasoning).
    """

    index: int
    score: float
    scores: dict[str, float] = {}
    token_logps: list[float] = []
    details: dict[str, Any] = {}


class SampleRewards(msgspec.Struct, frozen=True, kw_only=True):
    """Stage 1 for one sample: a score for each answer that could be scored.

    `unscored` maps a reason to the indices of answers without a score. `judge` holds per-sample
    counters that `stats.json` sums over the run (verdicts, ties, flips ...). `details` is for a
    person to read: what judges said of the sample as a whole, and replies that could not be read.
    """

    key: str
    scores: list[AnswerScore]
    unscored: dict[str, list[int]] = {}
    judge: dict[str, float] = {}
    details: dict[str, Any] = {}


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """A candidate row of the dataset: indices into the sample's answers, and the scores."""

    key: str
    chosen: int
    rejected: int
    chosen_score: float
    rejected_score: float

    @property
    def margin(self) -> float:
        return self.chosen_score - self.rejected_score


class ShardInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One shard, as its line in the manifest says. `sha256` is of the tar's bytes."""

    index: int
    num_samples: int
    num_bytes: int
    sha256: str
    keys: list[str]
    ids: list[str]
    images: dict[int, int] = {}
    """Number of pictures -> number of samples with as many; {} in old manifests."""
    carried: list[str] | None = None
    """`carried_hash` of each sample; [] where none carries anything, None in old manifests."""


class DatasetPair(msgspec.Struct, frozen=True, kw_only=True):
    """A row of a finished dataset, whatever its format.

    `question` has marks only where pictures stand inside the text. Scores are None where the
    dataset has none.
    """

    idx: str
    question: str
    images: tuple[EncodedImage, ...]
    chosen: str
    rejected: str
    chosen_score: float | None = None
    rejected_score: float | None = None
    split: str = "train"

    @property
    def margin(self) -> float | None:
        """How much better the chosen answer was scored."""
        if self.chosen_score is None or self.rejected_score is None:
            return None
        return self.chosen_score - self.rejected_score
