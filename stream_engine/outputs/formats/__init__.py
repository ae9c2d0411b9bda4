"""The final dataset in each trainer's schema. A format is one file here and one line below.

Of pairs, in EXPORTS:

    rlaifv               RLAIF-V's parquet, with the reference model's log-probs (the default)
    trl                  TRL's conversational preference parquet; axolotl reads it too
    trl_reward           TRL's rows for reward models: the prompt stands in both conversations
    ms_swift             parquet for ms-swift
    llama_factory        parquet for LLaMA-Factory, and its dataset_info.json
    ms_swift_jsonl       the same rows as JSON lines, the pictures as files beside them
    llama_factory_jsonl  likewise

Of answers, in RANKINGS:

    ranked               every question with all its answers, their scores, ranks and log-probs
    trl_kto              TRL's unpaired preferences: the best answers and the worst, labelled
    trl_sft              TRL's prompts and completions: the best answers alone

An export is handed rows one at a time and holds at most one row group of them. A row that its
schema cannot express is refused by a reason, which the merger counts.
"""

from __future__ import annotations

from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError
from stream_engine.outputs.formats.base import DatasetFiles, Export, Ranking
from stream_engine.outputs.formats.llama_factory import (
    LlamaFactoryExport,
    LlamaFactoryJsonlExport,
)
from stream_engine.outputs.formats.ms_swift import MsSwiftExport, MsSwiftJsonlExport
from stream_engine.outputs.formats.ranked import RankedAnswers
from stream_engine.outputs.formats.rlaifv import RlaifvExport
from stream_engine.outputs.formats.trl import (
    TrlExport,
    TrlKtoRanking,
    TrlRewardExport,
    TrlSftRanking,
)
from stream_engine.text import nearest

EXPORTS: dict[str, type[Export]] = {
    "rlaifv": RlaifvExport,
    "trl": TrlExport,
    "trl_reward": TrlRewardExport,
    "ms_swift": MsSwiftExport,
    "llama_factory": LlamaFactoryExport,
    "ms_swift_jsonl": MsSwiftJsonlExport,
    "llama_factory_jsonl": LlamaFactoryJsonlExport,
}

RANKINGS: dict[str, type[Ranking]] = {
    "ranked": RankedAnswers,
    "trl_kto": TrlKtoRanking,
    "trl_sft": TrlSftRanking,
}

FORMATS: dict[str, type[DatasetFiles]] = {**EXPORTS, **RANKINGS}

OTHER_TRAINERS = {
    "axolotl": "axolotl reads the rows of `trl` (see that dataset's card)",
    "openrlhf": "OpenRLHF's DPO reads texts only, so that the pictures would be lost",
    "verl": "verl trains on pairs of texts only, so that the pictures would be lost",
}
"""Trainers that have no format of their own here, and why."""


def check_formats(config: RunConfig) -> None:
    """Check the formats of a run before it begins.

    Raises:
        ConfigError: for an unknown one, and one that holds log-probs where no model computes them.
    """
    for name in config.format:
        if export_class(name).needs_logps and config.sampler and not config.instruct_model_path:
            others = ", ".join(other for other, kind in EXPORTS.items() if not kind.needs_logps)
            raise ConfigError(
                f"format {name} holds the instruct model's log-probs of the answers, which a "
                "--sampler does not give: add the --instruct_model_path that is to be trained, or "
                f"choose from {others}"
            )


def export_class(name: str) -> type[Export]:
    """The format of pairs of that name.

    Raises:
        ConfigError: for an unknown name, with the known ones, and for a format of answers.
    """
    if name in RANKINGS:
        raise ConfigError(
            f"format {name!r} holds answers, not pairs: `stream-engine rank WORK_DIR --format "
            f"{name}` writes it"
        )
    if name not in EXPORTS:
        raise ConfigError(unknown(name, list(EXPORTS)))
    return EXPORTS[name]


def ranking_class(name: str) -> type[Ranking]:
    """The format of answers of that name.

    Raises:
        ConfigError: for an unknown name, with the known ones, and for a format of pairs.
    """
    if name in EXPORTS:
        raise ConfigError(
            f"format {name!r} holds pairs, not answers: `stream-engine export WORK_DIR --format "
            f"{name}` writes it"
        )
    if name not in RANKINGS:
        raise ConfigError(unknown(name, list(RANKINGS)))
    return RANKINGS[name]


def unknown(name: str, known: list[str]) -> str:
    """What to say of a name that no format has."""
    simple = name.lower().replace("-", "_")
    why = OTHER_TRAINERS.get(simple.replace("_", ""))
    choice = f"choose from {', '.join(known)}"
    if why:
        return f"no format {name!r}: {why}; {choice}"
    return f"unknown format {name!r}{nearest(simple, known)}; {choice}"
