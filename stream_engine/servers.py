"""Models that a server runs: how they are named, and how their server is asked.

    openai:http://host:8000/v1#Qwen/Qwen2.5-VL-7B-Instruct

is a model of a server that speaks OpenAI's chat completions: vLLM, SGLang, llama.cpp, hosted ones.
Keys are no part of a name: they are read from the environment alone (see remote/keys.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

from stream_engine.errors import ConfigError

PREFIX = "openai:"


@dataclass(frozen=True, kw_only=True)
class ServerConfig:
    """Models on servers: which one draws the answers, and how every server is asked."""

    sampler: str | None = None
    """A model that draws the answers on an OpenAI-compatible server, as `openai:URL#MODEL`; the
    instruct model, where it is given, then computes their log-probs alone. --reward_model_path
    takes such names for judges. Keys: ROLE_API_KEY (SAMPLER_API_KEY, CRITIC_API_KEY ...) or else
    OPENAI_API_KEY, from the environment alone."""
    server_requests: int = 16
    """Requests that a worker has at once at each of these models."""
    server_requests_per_minute: float | None = None
    """A worker begins at most this many a minute at each of them; none: as fast as is answered."""
    server_seeds: bool = True
    """Send each request the seed that the reply would have here. What a server makes of it is its
    own affair; one that refuses it is asked without."""
    server_timeout_s: float = 300.0
    """A request that is not answered by then is tried again."""
    server_retries: int = 8
    """How often a request is tried again after errors that may pass."""
    server_backoff_s: float = 0.5
    """Seconds before a request is tried again, doubled each time up to a minute, with jitter; a
    server that names a time (Retry-After) is taken at its word."""
    token_prices: tuple[str, ...] = ()
    """What a million tokens of a role cost, for `status`, as ROLE=PROMPT/COMPLETION:
    sampler=0.15/0.6,critic=2.5/10."""


class ModelSettings(Protocol):
    """What of the other settings counts here."""

    @property
    def instruct_model_path(self) -> str | None: ...
    @property
    def reward_model_path(self) -> str | None: ...
    @property
    def tensor_parallel(self) -> int: ...


@dataclass(frozen=True)
class ServedModel:
    """A model on a server: `url` is what `/chat/completions` is put behind."""

    url: str
    name: str


def served(path: str | None) -> ServedModel | None:
    """The model on a server that a setting names; None when it names something else.

    Raises:
        ConfigError: for a name of this kind that is not well formed. It shows no part of the URL
            that may hold a secret.
    """
    if not path or not path.startswith(PREFIX):
        return None
    address, _, name = path.removeprefix(PREFIX).partition("#")
    form = "write openai:URL#MODEL, as in openai:http://host:8000/v1#my-model"
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise ConfigError(f"a model on a server has a URL that cannot be read; {form}") from error
    if parts.username is not None or parts.query:
        raise ConfigError(
            "the URL of a model on a server must hold no user, password or query, since it is kept "
            f"in run.json; give its key as OPENAI_API_KEY in the environment, and {form}"
        )
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"{path!r}: {form}")
    if not name:
        raise ConfigError(f"{path!r} does not name the model; {form}")
    return ServedModel(address.rstrip("/"), name)


def check_servers(config: ServerConfig, models: ModelSettings) -> None:
    """Check every rule that needs no network.

    Raises:
        ConfigError: with the value and the rule.
    """
    if config.sampler is not None and served(config.sampler) is None:
        raise ConfigError(
            f"sampler {config.sampler!r} is no model on a server: write openai:URL#MODEL; a "
            "checkpoint that is to draw the answers is the --instruct_model_path"
        )
    if (models.instruct_model_path or "").startswith(PREFIX):
        raise ConfigError(
            "the instruct_model_path is a checkpoint, whose log-probs are computed here: a model "
            "on a server that draws the answers is the --sampler"
        )
    judges = [served(path.strip()) for path in (models.reward_model_path or "").split(",")]
    if models.tensor_parallel > 1 and (config.sampler or any(judges)):
        raise ConfigError(
            f"tensor_parallel {models.tensor_parallel} does not go together with models on a "
            "server, since each of its ranks would ask it"
        )
    if config.server_requests < 1:
        raise ConfigError(f"server_requests must be at least 1, it is {config.server_requests}")
    if config.server_retries < 0:
        raise ConfigError(f"server_retries must be 0 or more, it is {config.server_retries}")
    for name in ("server_requests_per_minute", "server_timeout_s", "server_backoff_s"):
        value = getattr(config, name)
        if value is not None and value <= 0:
            raise ConfigError(f"{name} must be positive, it is {value}")
    prices_of(config.token_prices)


def prices_of(texts: tuple[str, ...] | list[str]) -> dict[str, tuple[float, float]]:
    """Role -> price of a million prompt tokens, and of a million completion tokens.

    Raises:
        ConfigError: for a text that is no ROLE=PROMPT/COMPLETION.
    """
    found = {}
    for text in texts:
        role, _, prices = text.partition("=")
        prompt, _, completion = prices.partition("/")
        try:
            found[role] = float(prompt), float(completion)
        except ValueError as error:
            raise ConfigError(
                f"token_prices {text!r}: write ROLE=PROMPT/COMPLETION, as in sampler=0.15/0.6"
            ) from error
    return found
