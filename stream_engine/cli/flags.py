"""Command-line flags, made from the fields of RunConfig, so that neither can drift from the other.

A field's docstring is its help. Every name is accepted with underscores or dashes. Only flags that
were given become settings: what is absent is left to the config file, the run or the default.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import os
import sys
import types
import typing
from functools import cache
from typing import Any

import msgspec

from stream_engine.cli.run_file import ALIASES, settings_in_file
from stream_engine.config import (
    InputConfig,
    ModelConfig,
    OutputConfig,
    RankingConfig,
    RunConfig,
    SamplingConfig,
    WorkerConfig,
    names_of,
    parse_columns,
)
from stream_engine.errors import ConfigError
from stream_engine.pipelines import known_pipelines, pipeline_class
from stream_engine.servers import ServerConfig
from stream_engine.text import nearest

GROUPS: dict[str, type] = {
    "the run": RunConfig,
    "input": InputConfig,
    "models": ModelConfig,
    "models on servers": ServerConfig,
    "sampling": SamplingConfig,
    "pairs": RankingConfig,
    "output": OutputConfig,
    "workers": WorkerConfig,
}
NOT_FLAGS = ("pipeline_options",)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each setting, and for each pipeline's own options."""
    parser.add_argument(
        "--config", metavar="FILE", help="settings from a YAML or TOML file; flags win"
    )
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # launchers add it
    in_parts = {
        name for part in GROUPS.values() if part is not RunConfig for name in names_of(part)
    }
    for title, part in GROUPS.items():
        group = parser.add_argument_group(title)
        skipped = in_parts.union(NOT_FLAGS) if part is RunConfig else frozenset()
        for field in settings_of(part):
            if field.name not in skipped:
                _add_flag(group, field, field_docs(part).get(field.name, ""))
    added: set[str] = set()
    for pipeline in known_pipelines():
        options = pipeline_class(pipeline).Options
        new = [field for field in own_fields(options) if field.name not in added]
        added.update(field.name for field in new)
        if new:
            group = parser.add_argument_group(f"only with --pipeline_name {pipeline}")
            for field in new:
                _add_flag(group, field, field_docs(options).get(field.name, ""))


def read_settings(
    args: argparse.Namespace, base: dict[str, Any] | None = None, *, number: int | None = None
) -> dict[str, Any]:
    """Settings from `base`, then the config file, then the flags; later ones win.

    Args:
        number: of the round that is meant, of a file that has rounds.

    Raises:
        ConfigError: for an unknown name in the file, a value that does not fit, or an option of
            another pipeline than the chosen one.
    """
    settings: dict[str, Any] = dict(base or {})
    given = settings_in_file(args.config, number)
    given |= given.pop("pipeline_options", None) or {}
    name = args.pipeline_name or given.get("pipeline_name") or settings.get("pipeline_name")
    settings["pipeline_name"] = name or RunConfig.pipeline_name
    options = {f.name: f for f in own_fields(pipeline_class(settings["pipeline_name"]).Options)}
    chosen = {k: v for k, v in settings.get("pipeline_options", {}).items() if k in options}
    for name, value in given.items():
        if name in names_of(RunConfig):
            settings[name] = value
        elif name in options:
            chosen[name] = value
        else:
            known = [*names_of(RunConfig), *options]
            raise ConfigError(
                f"{args.config}: unknown setting {name!r}{elsewhere(name) or nearest(name, known)}"
            )
    for field in settings_of(RunConfig):
        if (text := getattr(args, field.name, None)) is not None:
            settings[field.name] = convert_flag(field.name, text, field.type)
    for name in option_names():
        if (text := getattr(args, name, None)) is None:
            continue
        if name not in options:
            raise ConfigError(
                f"--{name} is no option of {settings['pipeline_name']}{elsewhere(name)}"
            )
        chosen[name] = convert_flag(name, text, options[name].type)
    return settings | {"pipeline_options": chosen}


def convert_flag(name: str, text: str | list[str], kind: Any) -> Any:
    """A flag's text as its field's type.

    Raises:
        ConfigError: naming the flag, the value and what was expected.
    """
    value: Any = text
    if typing.get_origin(kind) is dict and isinstance(text, str):
        return parse_columns(text)
    if isinstance(text, list):
        value = [part for item in text for part in parts_of(name, item) if part]
    elif text.lower() == "none" and type(None) in typing.get_args(kind):
        value = None
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        choices = _choices(kind)
        expected = f"choose from {', '.join(map(str, choices))}" if choices else str(error)
        raise ConfigError(f"--{name} {text!r}: {expected}") from error


def parts_of(name: str, item: str) -> list[str]:
    """The values that stand in one word, between commas; a file may have some in its name."""
    return [item] if name == "dataset_path" and os.path.exists(item) else item.split(",")


def elsewhere(name: str) -> str:
    """`"; it belongs to --pipeline_name x"` when another pipeline has an option of that name."""
    for pipeline in known_pipelines():
        if name in pipeline_class(pipeline).Options.__struct_fields__:
            return f"; it belongs to --pipeline_name {pipeline}"
    return ""


class Setting(msgspec.Struct, frozen=True):
    """A field that is a flag: of a part of RunConfig, or of a pipeline's options."""

    name: str
    type: Any
    default: Any


def settings_of(part: type) -> list[Setting]:
    """The fields of a part of RunConfig, a dataclass, or of a pipeline's options, a Struct."""
    if dataclasses.is_dataclass(part):
        kinds = typing.get_type_hints(part)
        return [Setting(f.name, kinds[f.name], f.default) for f in dataclasses.fields(part)]
    return [Setting(f.name, f.type, f.default) for f in msgspec.structs.fields(part)]


def own_fields(options: type[msgspec.Struct]) -> list[Setting]:
    """A pipeline's options that are not also settings of the run."""
    return [field for field in settings_of(options) if field.name not in names_of(RunConfig)]


def option_names() -> list[str]:
    """The own options of every pipeline."""
    parts = (pipeline_class(name).Options for name in known_pipelines())
    return list(dict.fromkeys(field.name for part in parts for field in own_fields(part)))


def boolean_flags() -> frozenset[str]:
    """Names of the settings, and of every pipeline's options, that are true or false."""
    parts: list[type] = [RunConfig]
    parts += [pipeline_class(name).Options for name in known_pipelines()]
    fields = (field for part in parts for field in settings_of(part))
    return frozenset(field.name for field in fields if field.type is bool)


def field_docs(part: type) -> dict[str, str]:
    """The string that stands below each field in the source: its documentation."""
    return _docs_in(part.__module__).get(part.__name__, {})


@cache
def _docs_in(module: str) -> dict[str, dict[str, str]]:
    """The documentation of the fields of each class of a module."""
    docs: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, text in zip(node.body, node.body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                doc = " ".join(text.value.value.split())
                docs.setdefault(node.name, {})[field.target.id] = doc
    return docs


def _add_flag(group: Any, field: Setting, doc: str) -> None:
    has_default = field.default not in (msgspec.NODEFAULT, dataclasses.MISSING)
    default = field.default if has_default else None
    names = [f"--{field.name}", *(f"--{a}" for a, name in ALIASES.items() if name == field.name)]
    text = doc.replace("%", "%%")
    if default not in (None, (), False, ""):
        shown = ",".join(default) if isinstance(default, tuple) else default
        text = f"{text} (default {shown})".strip()
    kind: dict[str, Any] = {"metavar": _metavar(field.type)}
    if typing.get_origin(field.type) is tuple:
        kind["action"] = "append"
    group.add_argument(*names, dest=field.name, help=text or " ", **kind)


def _choices(kind: Any) -> tuple[Any, ...]:
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        choices = tuple(c for part in typing.get_args(kind) for c in _choices(part))
        return (*choices, "N") if choices and int in typing.get_args(kind) else choices
    return ()


def _metavar(kind: Any) -> str:
    if choices := _choices(kind):
        return "{" + ",".join(map(str, choices)) + "}"
    if kind is bool:
        return "{true,false}"
    if typing.get_origin(kind) is tuple:
        return "A,B,..."
    if typing.get_origin(kind) is dict:
        return "OURS=YOURS,..."
    parts = [part for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    return {int: "N", float: "X"}.get(parts[0], "TEXT")
