"""The final dataset in each trainer's schema. A format is one file here and one line in EXPORTS.

    rlaifv               RLAIF-V's parquet, with the reference model's log-probs (the default)
    trl                  TRL's conversational preference parquet; axolotl reads it too
    ms_swift             parquet for ms-swift
    llama_factory        parquet for LLaMA-Factory, and its dataset_info.json
    ms_swift_jsonl       the same rows as JSON lines, the pictures as files beside them
    llama_factory_jsonl  likewise

An export is handed rows one at a time and holds at most one row group of them. A row that its
schema cannot express is refused by a reason, which the merger counts.
"""

from __future__ import annotations

from stream_engine.errors import ConfigError
from stream_engine.outputs.formats.base import Export
from stream_engine.outputs.formats.llama_factory import (
    LlamaFactoryExport,
    LlamaFactoryJsonlExport,
)
from stream_engine.outputs.formats.ms_swift import MsSwiftExport, MsSwiftJsonlExport
from stream_engine.outputs.formats.rlaifv import RlaifvExport
from stream_engine.outputs.formats.trl import TrlExport
from stream_engine.text import nearest

EXPORTS: dict[str, type[Export]] = {
    "rlaifv": RlaifvExport,
    "trl": TrlExport,
    "ms_swift": MsSwiftExport,
    "llama_factory": LlamaFactoryExport,
    "ms_swift_jsonl": MsSwiftJsonlExport,
    "llama_factory_jsonl": LlamaFactoryJsonlExport,
}

OTHER_TRAINERS = {
    "axolotl": "axolotl reads the rows of `trl` (see that dataset's card)",
    "openrlhf": "OpenRLHF's DPO reads texts only, so that the pictures would be lost",
    "verl": "verl trains on pairs of texts only, so that the pictures would be lost",
}
"""Trainers that have no format of their own here, and why."""


def export_class(name: str) -> type[Export]:
    """The format of that name.

    Raises:
        ConfigError: for an unknown name, with the known ones.
    """
    if name not in EXPORTS:
        simple = name.lower().replace("-", "_")
        why = OTHER_TRAINERS.get(simple.replace("_", ""))
        known = f"choose from {', '.join(EXPORTS)}"
        if why:
            raise ConfigError(f"no format {name!r}: {why}; {known}")
        raise ConfigError(f"unknown format {name!r}{nearest(simple, list(EXPORTS))}; {known}")
    return EXPORTS[name]
