"""One dataset in the making: its files in a scratch folder, then its record, card and publication.

Knows no schema and does not count; who writes the rows does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from stream_engine.outputs.formats.base import DatasetFiles
from stream_engine.outputs.parquet import Part
from stream_engine.outputs.publication import Publication, with_token
from stream_engine.outputs.published import (
    CARD,
    content_hash,
    record_of,
    record_of_bytes,
    record_of_file,
)
from stream_engine.run_dir.sealed import sealed


class CardOf(Protocol):
    """Makes the card of a dataset: its stats.json, the hash of its rows, what ends their names."""

    def __call__(self, stats: Mapping[str, Any], *, content: str, token: str) -> str: ...


class Output:
    """A dataset on its way into its folder."""

    def __init__(
        self, name: str, publication: Publication, scratch: Path, files: DatasetFiles
    ) -> None:
        self.name = name
        self.publication = publication
        self.scratch = scratch
        self.files = files

    def seal(self, stats: Mapping[str, Any], parts: Sequence[Part], card_of: CardOf) -> None:
        """Name the closed files by their content, and make card and record.

        The record has every file, for `validate` and for the next merge to hold it against.
        """
        hashed = {part.name: record_of_file(self.scratch / part.name) for part in parts}
        content = content_hash(hashed)
        token = content[:8]
        self.rows = {name: with_token(name, token) for name in hashed}
        named = [msgspec.structs.replace(part, name=self.rows[part.name]) for part in parts]
        told = [msgspec.structs.replace(part, origin="") for part in named]
        origins = {part.name: part.origin for part in named if part.origin}
        stats = {**stats, "parts": msgspec.to_builtins(told), "origins": origins}
        self.files.describe(lambda name: with_token(name, token))
        files = {self.rows[name]: record for name, record in hashed.items()}
        files |= record_of(self.scratch, but=hashed)
        self.card = card_of(stats, content=content, token=token).encode()
        files[CARD] = record_of_bytes(self.card)
        self.record = sealed({**stats, "files": msgspec.to_builtins(files)})

    def publish(self) -> None:
        """Put what `seal` made into the dataset's folder."""
        self.publication.put(self.scratch, self.rows, card=self.card, record=self.record)
