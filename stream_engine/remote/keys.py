"""Keys of servers: read from the environment here, and shown nowhere."""

from __future__ import annotations

import os

from stream_engine.errors import ConfigError


def key_of(role: str) -> str:
    """The key with which a role's server is asked; "" when it is asked without one.

    ROLE_API_KEY where that is set (empty: none), else OPENAI_API_KEY.

    Raises:
        ConfigError: when it cannot stand in a header.
    """
    variable = f"{role.upper()}_API_KEY"
    variable = variable if variable in os.environ else "OPENAI_API_KEY"
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{variable} holds characters that no key has (a line break, a space?)")
    return key


def without_key(text: str, key: str) -> str:
    """What a server says, without the key, which some repeat."""
    return text.replace(key, "***") if key else text
