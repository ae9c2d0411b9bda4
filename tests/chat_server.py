"""A stand-in for a server of chat completions, for faults that a real one shows at no command.

A question's words say what shall happen to it: "poison" is answered with 500 always, "refused" with
400, "filtered" is held back; of any other each request may fail before it is answered, as `faults`
says. It answers with the question's seed, so that a test can tell every answer from every other.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_S = 30.0
PAIR = re.compile(r"first response: \[(.*?)\]\nThe second response: \[(.*?)\]", re.DOTALL)


class ChatServer(ThreadingHTTPServer):
    """Counts what it was asked and what it answered, by the text of the request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.key = ""
        self.faults: tuple[str, ...] = ()
        """What happens to each request before it is answered, one after the other."""
        self.is_down = False
        self.gives_logprobs = True
        self.unknown_fields: tuple[str, ...] = ()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.num_at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def model(self, name: str = "tiny") -> str:
        """What a setting names it by."""
        return f"openai:{self.url}#{name}"

    def handle_error(self, *args: object) -> None:
        pass  # clients that hung up


@contextmanager
def running() -> Iterator[ChatServer]:
    server = ChatServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stopped.set()
        server.shutdown()
        server.server_close()


def text_of(body: dict[str, Any]) -> str:
    content = body["messages"][0]["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def reply_to(text: str, seed: int) -> str:
    """Of two responses the one that is greater as text is better; else the seed in words."""
    if found := PAIR.search(text):
        return "[first]" if found[1] > found[2] else "[second]"
    if "### Facts" in text or "### Modified sentences" in text:
        return "### List:\n- one of them"
    return f"It is number {seed}."


class Answering(BaseHTTPRequestHandler):
    server: ChatServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with server.lock:
            server.num_at_once += 1
            server.most_at_once = max(server.most_at_once, server.num_at_once)
        try:
            self.answer(body)
        finally:
            with server.lock:
                server.num_at_once -= 1

    def answer(self, body: dict[str, Any]) -> None:
        server, text = self.server, text_of(body)
        name = f"{text} {body.get('seed')}"
        with server.lock:
            tried = server.asked[name]
            server.asked[name] += 1
            server.bodies.append(body)
        if server.key and self.headers.get("authorization") != f"Bearer {server.key}":
            return self.refuse(401, f"wrong key: {self.headers.get('authorization')}")
        if server.is_down:
            return self.refuse(503, "loading")
        if unknown := [field for field in server.unknown_fields if field in body]:
            return self.refuse(400, f"Unrecognized request argument supplied: {unknown[0]}")
        if "poison" in text:
            return self.refuse(500, "the worker died")
        if "refused" in text:
            return self.refuse(400, "This model's maximum context length is 8 tokens")
        if tried < len(server.faults) and text != "Say yes.":
            return self.fail(server.faults[tried])
        with server.lock:
            server.answered[name] += 1
        finish = "content_filter" if "filtered" in text else "stop"
        self.send(200, completion(reply_to(text, body.get("seed", 0)), finish, body, server))

    def fail(self, fault: str) -> None:
        if fault == "429":
            self.refuse(429, "slowly, please", {"retry-after": "0.05"})
        elif fault == "500":
            self.refuse(500, "oh")
        elif fault == "closed":
            self.close_connection = True
        elif fault == "cut":
            self.send_response(200)
            self.send_header("content-length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [{"mess')
            self.close_connection = True
        elif fault == "malformed":
            self.send(200, b"<html>Bad gateway</html>")
        elif fault == "empty":
            self.send(200, b'{"choices": []}')
        elif fault == "slow":
            self.server.stopped.wait(SLOW_S)
            self.close_connection = True
        else:
            raise AssertionError(fault)

    def refuse(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, json.dumps({"error": {"message": message}}).encode(), headers)

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


def completion(text: str, finish: str, body: dict[str, Any], server: ChatServer) -> bytes:
    """What OpenAI's API sends, tokens counted as words."""
    choice: dict[str, Any] = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish,
    }
    if body.get("logprobs") and server.gives_logprobs:
        tops = [{"token": " Yes", "logprob": -0.5}, {"token": "no", "logprob": -1.5}]
        choice["logprobs"] = {"content": [{"token": " Yes", "top_logprobs": tops}]}
    usage = {"prompt_tokens": 7, "completion_tokens": len(text.split())}
    return json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode()
