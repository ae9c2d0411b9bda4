"""Imported by the server that processes are forked from: done once, what each command would do."""

from __future__ import annotations

import importlib

from stream_engine import pipelines

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
pipelines.known_pipelines()
