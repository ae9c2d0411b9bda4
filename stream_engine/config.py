"""RunConfig: every setting of a run, from flags and files, checked once.

Flags and file keys have the same names; flags win. Each part below is what one piece of the code
needs: `config.part(RankingConfig)` picks it out, so that no function takes the whole.
A stage's fingerprint is a hash of the settings that shape its results, and of nothing else.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

import msgspec

from stream_engine.errors import ConfigError
from stream_engine.servers import ServerConfig, check_servers
from stream_engine.text import home_in, nearest

PartT = TypeVar("PartT")


Stage = Literal["rollouts", "rewards"]
STAGES: tuple[Stage, ...] = ("rollouts", "rewards")


class ModelRole(msgspec.Struct, frozen=True):
    """A model that a pipeline needs, and the stage that needs it."""

    name: str
    """"instruct", "reward", "split" ..."""
    path: str
    stage: Stage
    hint: str | None = None
    """The --*_model_name given for it."""
    sampling: SamplingConfig | None = None
    """How this role draws text; None: as the run's settings say."""
    draws: bool = True
    """False: it only scores given text, so that its engine keeps no room for answers."""


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """Where samples come from and how they are cut into shards."""

    dataset_path: tuple[str, ...] = ()
    """Files, folders, globs or fsspec URLs: parquet, jsonl, json, csv, a `datasets` directory,
    tars; compressed ones too. Or datasets of the Hugging Face hub, as `owner/name[:split]`."""
    columns: dict[str, str] = field(default_factory=dict)
    """How your columns are called, as `question=query,image=img,idx=uid`."""
    given_answers: Literal["answers", "pairs", "ignore"] = "answers"
    """What of a row is scored in place of sampled answers: its `answers`; pairs: its `chosen` and
    `rejected` too; ignore: nothing. Rows without are sampled."""
    text_only: Literal["reject", "allow"] = "reject"
    """What becomes of a question without any picture: rejected, or asked as it is."""
    image_root: str | None = None
    """When given, an `image_path` that leaves this folder is rejected."""
    follow_links: bool = False
    """Allow links inside image_root to lead out of it."""
    samples_per_shard: int = 128
    """Questions in one shard, the unit of work that a worker takes."""
    max_samples: int | None = None
    """Read at most this many samples of each input that it is given with (for trials)."""
    questions: int | None = None
    """Take this many questions that the run has not got, over all inputs in their order, and leave
    the others to later rounds (`stream-engine round`)."""
    max_image_pixels: int = 178_956_970
    """Images with more pixels are rejected as decompression bombs (Pillow's own limit), and so are
    those too long for their width: more than twice that on a square, or 200 times as long."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which checkpoints, and where they run."""

    instruct_model_path: str | None = None
    """The model whose answers are sampled, and which DPO is to train: a checkpoint folder, or a
    model of the Hugging Face hub as `owner/name[@revision]`."""
    instruct_model_name: str | None = None
    """A hint; the family is read from the checkpoint, and a contradiction is an error."""
    reward_model_path: str | None = None
    """The model that scores the answers, as --instruct_model_path. With divide_and_conquer three:
    `auto_check,question_change,split`; one that is named thrice is loaded once. A judge may be
    on a server: `openai:URL#MODEL`."""
    reward_model_name: str | None = None
    """A hint, as --instruct_model_name."""
    base_model_path: str | None = None
    """With dpo_reward the model that the reward is told against; default: the instruct model, in
    each round its own."""
    reward_model_python_path: str | None = None
    """Another interpreter, or a conda environment's name, for the reward stage."""
    vision_tower_path: str | None = None
    """CLIP weights for checkpoints that hold none."""
    device: str = "auto"
    """auto (a GPU of this rank where there is one, else CPU), cpu, cuda or cuda:N."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """auto: the checkpoint's own on an accelerator, float32 on CPU."""
    max_batch_tokens: int | None = None
    """Upper bound of tokens in one forward; None lets the engine choose."""
    max_rows: int | None = None
    """Upper bound of rows in a decode batch; None lets the engine choose."""
    placement: Literal["auto", "together", "staged"] = "auto"
    """Models side by side, or one at a time; auto: together where they fit."""
    tensor_parallel: int = 1
    """Ranks that hold each model together and act as one worker (DeepSpeed tensor parallelism)."""
    offload: Literal["cpu", "nvme"] | None = None
    """Keep the language models' weights in host memory, or on a local drive, and stream them
    through the GPU (DeepSpeed ZeRO-Inference)."""
    offload_path: str | None = None
    """A folder on a local drive, for --offload nvme."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How answers are drawn. None: the checkpoint's generation_config.json, then the default."""

    sample_k: int = 10
    """Answers sampled for each question."""
    temperature: float = 0.7
    """Sampling temperature of the answers; 0 is greedy."""
    top_p: float | None = None
    """Nucleus sampling: tokens up to this cumulative probability. Without it the value of the
    checkpoint's generation_config.json, else 1."""
    top_k: int | None = None
    """Sample from this many likeliest tokens; 0: all. Without it the checkpoint's, else 50."""
    repetition_penalty: float | None = None
    """As in transformers. Without it the checkpoint's value, else 1 (none)."""
    max_new_tokens: int | None = None
    """Longest answer in tokens. Without it the checkpoint's value, else 512."""
    seed: int = 0
    """Same seed, same answers: on any number of workers, in any order."""


@dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """How scored answers become pairs."""

    rank: int = 3
    """The best answers of a question, this many, are paired with as many of the worst."""
    distance: int = 25
    """A pair's answers differ by fewer words than this."""
    strict_follow_rank: bool = False
    """Pair the i-th best with the i-th worst only. Each answer is then in one pair: a critic's
    pairs train better so."""
    max_pairs_per_sample: int = 3
    """At most this many pairs of one question, largest margin first."""
    min_margin: float = 0.0
    """A pair's scores differ by at least this. The better a model has become, the more of its pairs
    differ by noise alone: of use in later rounds."""
    similarity_threshold: float = 0.9
    """Answers whose Jaccard similarity over word n-grams exceeds this count as one."""
    max_length_bias: float = 0.5
    """Length balance stops when mean(words of chosen - words of rejected) is at most this."""
    disagreements: Literal["keep", "relabel", "drop"] = "keep"
    """What becomes of a pair of the input (--given_answers pairs) whose order the scorer reverses:
    it stays as it was given, is turned around, or is dropped."""
    compat: Literal["rlaifv"] | None = None
    """rlaifv: the selection rules of RLAIF-V's data engine, with words of our own (see below)."""


@dataclass(frozen=True, kw_only=True)
class OutputConfig:
    """What is written at the end."""

    format: tuple[str, ...] = ("rlaifv",)
    """Schemas of the dataset: rlaifv, trl, ms_swift, llama_factory (parquet, the pictures inside),
    ms_swift_jsonl, llama_factory_jsonl; the first lies in dataset/."""
    test_fraction: float = 0.0
    """Share of the questions whose pairs go into a split `test` of every format, 0 to below 1."""
    best: int = 1
    """Of `stream-engine rank`: the best answers of each question, this many, go to trl_sft."""
    license: str = "unknown"
    """The license that the dataset's card states, by the hub's identifier (cc-by-4.0 ...)."""
    language: tuple[str, ...] = ()
    """The languages of questions and answers that the card states: en, zh ..."""
    pretty_name: str = ""
    """The dataset's title on its card."""
    max_part_bytes: int = 400_000_000
    """Upper bound of one parquet file of the dataset."""
    debug: bool = False
    """Also write readable intermediate files under debug/."""
    report: Literal["auto", "never"] = "auto"
    """auto: when the pairs are built, a page to look at them is written to report/index.html."""


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How workers share shards."""

    max_shard_retries: int = 2
    """How often a shard that raised is tried again; the last time its records go one by one."""
    retry_backoff_s: float = 2.0
    """Seconds before a shard is tried again, doubled each time."""
    lease_timeout_s: float = 60.0
    """A lease without a heartbeat for this long may be taken over."""
    max_bad_fraction: float = 0.5
    """Stop early when the reader rejects more than this share of the first 200 or more records, or
    when the stages set more than this share of the first 200 or more samples aside."""
    look_ahead: Literal["auto", "always", "never"] = "auto"
    """Begin the next shard in the rows that the last answers of a shard leave empty; auto: on an
    accelerator. The batch then depends on timing, and log-probs on it in their last bits."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    InputConfig,
    ModelConfig,
    ServerConfig,
    SamplingConfig,
    RankingConfig,
    OutputConfig,
    WorkerConfig,
):
    """Every setting of a run: its own, and those of the parts above.

    Raises:
        ConfigError: from `RunConfig.create` and `validate`, with the value and the rule.
    """

    pipeline_name: str = "dpo_reward"
    """How answers are scored: dpo_reward, divide_and_conquer, llava_critic or a plug-in."""
    work_dir: str = "work"
    """All that the run writes: a folder, or s3://, gs://, az://. An existing one is resumed."""
    run_stage: Literal[0, 1, 2] | None = None
    """0 sample, 1 reward, 2 pairs; None runs all."""
    track: Literal["trackio", "wandb", "tensorboard"] | None = None
    """Show the run in an experiment tracker, whose package must be installed: progress,
    throughput, drops, and pairs at the end."""
    overwrite: bool = False
    """Discard results that other settings made, instead of refusing."""
    beta: float = 0.1
    """The DPO beta of the implicit reward."""
    pipeline_options: dict[str, Any] = field(default_factory=dict)
    """Settings of the chosen pipeline alone, checked against its own Config."""

    def __post_init__(self) -> None:
        self.check_types()
        self.validate()

    @classmethod
    def create(cls, settings: dict[str, Any]) -> RunConfig:
        """Build from plain names and values; unknown names are refused with the nearest known."""
        for name in settings:
            if name not in names_of(cls):
                raise ConfigError(f"unknown setting {name!r}{nearest(name, names_of(cls))}")
        settings = dict(settings)
        for name in {"dataset_path", "format", "language", "token_prices"} & settings.keys():
            if isinstance(settings[name], str):
                settings[name] = tuple(part for part in settings[name].split(",") if part)
        if isinstance(settings.get("columns"), str):
            settings["columns"] = parse_columns(settings["columns"])
        try:
            given = msgspec.convert(settings, cls, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"bad setting: {error}") from error
        return replace(given)  # msgspec leaves inherited defaults to the class

    def check_types(self) -> None:
        """Refuse values of another type; lists become tuples, and path objects their names.

        A str is no list: as one it would be read letter by letter.
        """
        for name, kind in setting_types().items():
            value = getattr(self, name)
            if isinstance(value, str) and get_origin(kind) is tuple:
                raise ConfigError(f"{name} is a list: write [{value!r}]")
            try:
                object.__setattr__(self, name, msgspec.convert(as_plain(value), kind))
            except msgspec.ValidationError as error:
                raise ConfigError(f"bad setting: {name} {value!r}: {error}") from error
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{name} must be a number, it is {value}")

    def validate(self) -> None:
        """Check every rule that needs no file."""
        if self.sample_k < 1:
            raise ConfigError(f"sample_k must be at least 1, it is {self.sample_k}")
        if self.rank < 1:
            raise ConfigError(f"rank must be at least 1, it is {self.rank}")
        if 2 * self.rank > self.sample_k:
            fitting = f"--rank {self.sample_k // 2} or " if self.sample_k > 1 else ""
            raise ConfigError(
                f"rank {self.rank} needs at least {2 * self.rank} answers, "
                f"sample_k is {self.sample_k}; give {fitting}--sample_k {2 * self.rank}"
            )
        if self.temperature < 0:
            raise ConfigError(f"temperature must be 0 (greedy) or more, it is {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], it is {self.top_p}")
        if self.top_k is not None and self.top_k < 0:
            raise ConfigError(f"top_k must be 0 (off) or more, it is {self.top_k}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, it is {self.max_new_tokens}")
        if self.tensor_parallel > 1 and self.offload:
            raise ConfigError(
                f"tensor_parallel {self.tensor_parallel} and offload {self.offload} are two ways "
                "to run a model that one GPU cannot hold; give one of them"
            )
        if self.tensor_parallel > 1 and self.reward_model_python_path:
            raise ConfigError(
                f"tensor_parallel {self.tensor_parallel} and reward_model_python_path do not go "
                "together; run the rewards as --run_stage 1 with that interpreter's own launcher"
            )
        check_servers(self.part(ServerConfig), self.part(ModelConfig))
        for ours in self.columns:
            if ours not in COLUMN_NAMES:
                raise ConfigError(
                    f"columns maps {ours!r}, which is no column of ours"
                    f"{nearest(ours, COLUMN_NAMES)}; write ours=yours, ours are "
                    f"{', '.join(COLUMN_NAMES)}"
                )
        if self.offload == "nvme" and not self.offload_path:
            raise ConfigError("offload nvme needs --offload_path, a folder on a local drive")
        self.validate_numbers()
        if not 0 <= self.test_fraction < 1:
            raise ConfigError(f"test_fraction must be in [0, 1), it is {self.test_fraction}")

    def validate_numbers(self) -> None:
        """Check the numbers that have but a lower bound."""
        bounds: tuple[tuple[tuple[str, ...], str, Callable[[float], bool]], ...] = (
            (AT_LEAST_ONE, "at least 1", lambda value: value >= 1),
            (AT_LEAST_ZERO, "0 or more", lambda value: value >= 0),
            (ABOVE_ZERO, "positive", lambda value: value > 0),
        )
        for names, rule, is_kept in bounds:
            for name in names:
                value = getattr(self, name)
                if value is not None and not is_kept(value):
                    raise ConfigError(f"{name} must be {rule}, it is {value}")

    def part(self, kind: type[PartT]) -> PartT:
        """The settings of one part, as that part's type."""
        return kind(**{name: getattr(self, name) for name in names_of(kind)})

    def to_dict(self) -> dict[str, Any]:
        """Plain builtins, as stored in run.json; `RunConfig.create` reads them back."""
        return msgspec.to_builtins(self)


AT_LEAST_ONE = (
    *("samples_per_shard", "tensor_parallel", "distance", "max_pairs_per_sample", "questions"),
    *("max_part_bytes", "best", "max_samples", "max_image_pixels", "max_batch_tokens", "max_rows"),
)
AT_LEAST_ZERO = ("min_margin", "max_shard_retries", "retry_backoff_s", "max_bad_fraction")
ABOVE_ZERO = ("beta", "repetition_penalty", "lease_timeout_s")

COLUMN_NAMES = (
    *("question", "image", "images", "image_path", "idx", "conversations", "messages"),
    *("answers", "chosen", "rejected"),
    *("ds_name", "origin_dataset", "origin_split", "metainfos"),
)
"""What `columns` may name on its left side."""


def parse_columns(text: str) -> dict[str, str]:
    """`question=query,image=img` as a mapping of our names to the user's.

    Raises:
        ConfigError: for a part that is not of that form.
    """
    pairs = [part.partition("=") for part in text.split(",") if part.strip()]
    for ours, equals, theirs in pairs:
        if not (ours.strip() and equals and theirs.strip()):
            raise ConfigError(f"columns {text!r}: write ours=yours, as in question=query,image=img")
    names = [ours.strip() for ours, _, _ in pairs]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ConfigError(f"columns {text!r} maps {doubled!r} twice")
    return {ours.strip(): theirs.strip() for ours, _, theirs in pairs}


@functools.cache
def setting_types() -> dict[str, Any]:
    """The type of every setting."""
    kinds = get_type_hints(RunConfig)
    return {name: kinds[name] for name in names_of(RunConfig)}


def as_plain(value: Any) -> Any:
    """A value with path objects as their names, and `~/` as it is meant where no shell saw it."""
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    plain = os.fspath(value) if isinstance(value, os.PathLike) else value
    return home_in(plain) if isinstance(plain, str) and "~/" in plain else plain


def names_of(part: type) -> tuple[str, ...]:
    """The names of a part's settings, in order."""
    return tuple(field.name for field in fields(part))


def fingerprint(settings: dict[str, Any]) -> str:
    """Hash of plain settings, whatever their order: 16 hex digits."""
    encoded = msgspec.json.encode(settings, order="deterministic")
    return hashlib.blake2b(encoded, digest_size=8).hexdigest()
