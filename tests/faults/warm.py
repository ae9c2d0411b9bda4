"""Imported by the server that processes are forked from: done once, what each command would do."""

from __future__ import annotations

import functools
import importlib

from stream_engine import models, pipelines
from stream_engine.cli import flags

NAMES = (
    "pandas",  # pyarrow imports it when it makes a table
    "pyarrow.parquet",
    "webdataset",
    "stream_engine.api",
    "stream_engine.cli.looking",
    "stream_engine.cli.publishing",
    "stream_engine.cli.reports",
    "stream_engine.cli.working",
    "stream_engine.inputs.ingest",
    "stream_engine.outputs.formats",
    "stream_engine.outputs.validate",
    "stream_engine.pairs.merge_step",
    "stream_engine.report.run",
    "stream_engine.report.site",
    "tests.echo_pipeline",
)

for name in NAMES:
    importlib.import_module(name)
for module in (models, pipelines):  # reading the metadata of every package takes 20 ms a time
    module.entry_points = functools.cache(module.entry_points)
pipelines.known_pipelines()
flags.field_docs = functools.cache(flags.field_docs)
