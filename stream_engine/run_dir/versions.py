"""What shapes results beneath the settings: the versions that run.json keeps."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from stream_engine import __version__

VERSIONED_PACKAGES = ("torch", "transformers", "tokenizers", "webdataset", "pyarrow", "pillow")


def versions() -> dict[str, str]:
    """Versions of python, this package, and what shapes results beneath it."""
    found = {"python": platform.python_version(), "stream_engine": __version__}
    for name in VERSIONED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
