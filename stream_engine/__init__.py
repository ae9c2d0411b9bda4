"""stream_engine builds DPO preference datasets for vision-language models.

From Python: `RunConfig` and `run`, and `stream_engine.api`, which has these and more commands.

A sample's way: read in `inputs`, kept by `run_dir`, answered in `work` by `pipelines` over `engine`
over `models`, ranked in `pairs`, written in `outputs`, shown in `report`; `store` keeps the bytes.
The packages are layers, and imports run down only:

    cli > api > report, work > pairs > outputs > inputs > run_dir, pipelines > engine
        > models, demo > store > pictures > config, records, text > errors
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"
DISTRIBUTION = "stream-engine-dpo"  # its name for pip: `stream-engine` is another package there
__all__ = ["RunConfig", "__version__", "api", "run"]

if TYPE_CHECKING:
    from stream_engine import api
    from stream_engine.config import RunConfig
    from stream_engine.work.runner import run


def __getattr__(name: str) -> object:
    """Import the public names on first use, so that `import stream_engine` stays instant."""
    if name == "RunConfig":
        from stream_engine.config import RunConfig

        return RunConfig
    if name == "run":
        from stream_engine.work.runner import run

        return run
    if name == "api":
        import importlib

        return importlib.import_module("stream_engine.api")
    raise AttributeError(f"module 'stream_engine' has no attribute {name!r}")
