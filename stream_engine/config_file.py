"""A file of settings: YAML or TOML, as names and values. Knows no setting by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stream_engine.errors import ConfigError


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or TOML file of settings.

    Raises:
        ConfigError: when the file is missing, has another suffix or does not parse.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            settings = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {error}") from error
    elif path.suffix == ".toml":
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
        try:
            settings = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path} is not TOML: {error}") from error
    else:
        raise ConfigError(f"config file {path} must end in .yaml, .yml or .toml")
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold names and values, not {type(settings).__name__}")
    return settings
