"""A file of settings: YAML or TOML, as names and values. Knows no setting by name."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from stream_engine.errors import ConfigError
from stream_engine.text import home_in, one_line


def load_config_file(path: str | Path) -> dict[str, Any]:
    """Read a YAML or TOML file of settings.

    Raises:
        ConfigError: when the file is missing, has another suffix or does not parse.
    """
    path = Path(home_in(str(path)))
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"cannot read config file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"config file {path} is not UTF-8: {error}; save it as UTF-8") from error
    if path.suffix in (".yaml", ".yml"):
        import yaml

        try:
            refuse_doubled_names(yaml.compose(text, yaml.SafeLoader), path)
            settings = yaml.safe_load(text) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not YAML: {one_line(error)}") from error
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


def refuse_doubled_names(root: Any, path: Path) -> None:
    """Raise ConfigError for a name that stands twice, of which YAML's reader keeps the last alone.

    Names that differ by dashes and underscores are one.
    """
    nodes, visited = [root], set[int]()
    while nodes:
        node = nodes.pop()
        children = getattr(node, "value", None)
        if id(node) in visited or not isinstance(children, list):
            continue
        visited.add(id(node))
        pairs = [child for child in children if isinstance(child, tuple)]
        nodes += [pair[1] for pair in pairs] or children
        seen: set[str] = set()
        for key, _ in pairs:
            name = str(key.value).replace("-", "_")
            if name in seen:
                line = key.start_mark.line + 1
                raise ConfigError(f"{path}: {name!r} stands twice, the second time in line {line}")
            seen.add(name)
