"""The final dataset in each trainer's schema. A format is one file here and one line in EXPORTS.

    rlaifv         RLAIF-V's parquet, with the reference model's log-probs (the default)
    trl            TRL's conversational preference parquet
    ms_swift       jsonl and an images folder for ms-swift
    llama_factory  jsonl, dataset_info.json and an images folder for LLaMA-Factory

An export is handed rows one at a time and holds at most one row group of them. A row that its
schema cannot express is refused by a reason, which the merger counts.
"""

from __future__ import annotations

from stream_engine.config import nearest
from stream_engine.errors import ConfigError
from stream_engine.outputs.formats.base import Export
from stream_engine.outputs.formats.llama_factory import LlamaFactoryExport
from stream_engine.outputs.formats.ms_swift import MsSwiftExport
from stream_engine.outputs.formats.rlaifv import RlaifvExport
from stream_engine.outputs.formats.trl import TrlExport

EXPORTS: dict[str, type[Export]] = {
    "rlaifv": RlaifvExport,
    "trl": TrlExport,
    "ms_swift": MsSwiftExport,
    "llama_factory": LlamaFactoryExport,
}


def export_class(name: str) -> type[Export]:
    """The format of that name.

    Raises:
        ConfigError: for an unknown name, with the known ones.
    """
    if name not in EXPORTS:
        raise ConfigError(
            f"unknown format {name!r}{nearest(name, list(EXPORTS))}; "
            f"choose from {', '.join(EXPORTS)}"
        )
    return EXPORTS[name]
