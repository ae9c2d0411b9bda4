"""Models on servers, asked in words over HTTP. Knows no pipeline, no checkpoint and no file."""

from stream_engine.remote.messages import ChatRequest, Completion
from stream_engine.remote.model import ServerModel

__all__ = ["ChatRequest", "Completion", "ServerModel"]
