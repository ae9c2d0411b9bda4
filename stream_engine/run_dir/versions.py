"""What shapes results beneath the settings: the versions that run.json keeps."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from stream_engine import __version__

VERSIONED_PACKAGES = ("torch", "transformers", "tokenizers", "webdataset", "pyarrow", "pillow")


def versions() -> dict[str, str]:
    """Versions of python, this package, and what shapes results beneath it."""
    here = {"python": platform.python_version(), "stream_engine": __version__}
    return here | versions_of(VERSIONED_PACKAGES)


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of packages by their names; "not installed" of one that is missing."""
    found: dict[str, str] = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
