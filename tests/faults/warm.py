"""Imported by the server that processes are forked from: what commands import when they run."""

import pandas  # noqa: F401  pyarrow imports it when it makes a table
import pyarrow.parquet  # noqa: F401
import webdataset  # noqa: F401

import stream_engine.api
import stream_engine.cli.main
import stream_engine.inputs.ingest
import stream_engine.outputs.formats
import stream_engine.outputs.validate
import stream_engine.pairs.merge_step
import stream_engine.report.run
import stream_engine.report.site
import tests.echo_pipeline  # noqa: F401
