"""What is sent to a server that speaks OpenAI's chat completions, and what comes back.

Pictures go as data URLs, in their places in the text. What the settings leave open is left to the
server: a top_p of its own, or the checkpoint's generation_config.json.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from stream_engine.config import SamplingConfig
from stream_engine.errors import RecordError
from stream_engine.pictures import encoded_anew
from stream_engine.records import EncodedImage, prompt_parts
from stream_engine.remote.failures import PassingError

DEFAULT_MAX_TOKENS = 512
MOST_TOP_LOGPS = 20
BEGINNINGS = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png", b"GIF8": "gif"}
"""Of the kinds of pictures that servers read; WebP is told by more than its beginning."""

REFUSED_FIELD = re.compile(
    r"unsupported|unrecogni[sz]ed|unknown|not (permitted|supported|allowed)|extra|unexpected", re.I
)
"""How servers speak of a field that they do not take."""


@dataclass(frozen=True)
class ChatRequest:
    """One question about pictures. `name` is the asker's, and comes back with the reply.

    `wants_logps`: not a reply is wanted, but how likely its first token is to be what.
    """

    name: tuple[str, ...]
    question: str
    images: tuple[EncodedImage, ...] = ()
    seed: int = 0
    wants_logps: bool = False


@dataclass(frozen=True)
class Completion:
    """A server's reply; `top_logps` are of the likeliest first tokens, None where it gave none."""

    text: str
    is_cut: bool
    prompt_tokens: int = 0
    completion_tokens: int = 0
    top_logps: tuple[tuple[str, float], ...] | None = None


def body_of(
    request: ChatRequest, model: str, sampling: SamplingConfig, left_out: frozenset[str]
) -> dict[str, Any]:
    """The JSON of a request. `left_out` names what this server does not take: see `concession`."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": content_of(request)}],
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_new_tokens or DEFAULT_MAX_TOKENS,
        "seed": request.seed,
    }
    for name in ("top_p", "top_k", "repetition_penalty"):
        if (value := getattr(sampling, name)) is not None:
            body[name] = value
    if request.wants_logps:
        most = 5 if "top_logprobs" in left_out else MOST_TOP_LOGPS
        body |= {"temperature": 0, "max_tokens": 1, "logprobs": True, "top_logprobs": most}
    if "max_tokens" in left_out:
        body["max_completion_tokens"] = body.pop("max_tokens")
    if "seed" in left_out:
        del body["seed"]
    return body


def concession(body: Mapping[str, Any], detail: str) -> str | None:
    """The part of a refused request that this server takes in another form, or not at all.

    Newer models of OpenAI want `max_completion_tokens`; some servers take no seed, or give the five
    likeliest tokens at most.
    """
    if "max_tokens" in body and "max_completion_tokens" in detail:
        return "max_tokens"
    if "seed" in body and "seed" in detail.lower() and REFUSED_FIELD.search(detail):
        return "seed"
    if body.get("top_logprobs") == MOST_TOP_LOGPS and "logprobs" in detail:
        return "top_logprobs"
    return None


def content_of(request: ChatRequest) -> str | list[dict[str, Any]]:
    """The user's turn: a text or, with pictures, its parts in order."""
    parts = prompt_parts(request.question, len(request.images))
    if not request.images:
        return "".join(part or "" for part in parts)
    images = iter(request.images)
    return [
        {"type": "image_url", "image_url": {"url": data_url(next(images).data)}}
        if part is None
        else {"type": "text", "text": part}
        for part in parts
    ]


def data_url(data: bytes) -> str:
    """A picture as a data URL; of a kind that servers may not know, encoded anew as PNG."""
    kind = kind_of(data)
    if kind is None:
        data, kind = encoded_anew(data), "png"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def kind_of(data: bytes) -> str | None:
    """The kind of a picture that servers read, by how it begins."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((kind for begin, kind in BEGINNINGS.items() if data.startswith(begin)), None)


def read_completion(content: bytes) -> Completion:
    """The reply in the content of a response.

    Raises:
        PassingError: for what is no chat completion, as of a proxy that is in trouble.
        RecordError: when the server held the reply back.
    """
    try:
        reply = msgspec.json.decode(content)
        choice = reply["choices"][0]
        text = choice["message"].get("content") or ""
        assert isinstance(text, str)
        finish = choice.get("finish_reason")
        usage = reply.get("usage") or {}
        asked, made = (int(usage.get(f"{kind}_tokens") or 0) for kind in ("prompt", "completion"))
        found = (choice.get("logprobs") or {}).get("content") or []
        tops = found[0]["top_logprobs"] if found else None
        logps = None if tops is None else tuple((t["token"], float(t["logprob"])) for t in tops)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PassingError("bad_reply", "the server's reply is no JSON") from error
    except (LookupError, TypeError, AttributeError, ValueError, AssertionError) as error:
        raise PassingError("bad_reply", "the server's reply is no chat completion") from error
    if finish == "content_filter":
        raise RecordError("content_filter", "the server held its reply back")
    return Completion(text, finish == "length", asked, made, logps)


def detail_of(content: bytes, *, limit: int = 300) -> str:
    """What a response that is an error says, in one line."""
    text = content.decode("utf-8", "replace")
    try:
        told = msgspec.json.decode(content)
        while isinstance(told, dict):
            told = next((told[n] for n in ("error", "message", "detail") if n in told), None)
        text = told if isinstance(told, str) else text
    except msgspec.DecodeError:
        pass
    return " ".join(text.split())[:limit]
