"""A real S3 server in a process of its own (moto's), and a proxy before it that misbehaves.

moto checks the conditions of puts (If-None-Match, If-Match) as S3 does. It checks no signatures and
no rights, is consistent at once, knows no throttling, and keeps all in memory.
"""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

import boto3

Fault = Literal["", "lost", "fail", "repeat", "cut"]
"""lost: done, but the answer does not arrive; fail: 503, not done; repeat: it arrives twice; cut:
done, but the answer's body breaks off in its midst."""

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def environment(address: str) -> dict[str, str]:
    """What a user would set."""
    return {**KEYS, "AWS_ENDPOINT_URL": address, "FSSPEC_S3_ENDPOINT_URL": address}


@contextmanager
def s3_server(bucket: str = "bucket") -> Iterator[str]:
    """A server with one bucket; yields its address."""
    port = free_port()
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(port)
        client(address).create_bucket(Bucket=bucket)
        yield address
    finally:
        server.kill()
        server.wait()


def client(address: str) -> Any:
    names = {
        "aws_access_key_id": "test",
        "aws_secret_access_key": "test",
        "region_name": "us-east-1",
    }
    return boto3.client("s3", endpoint_url=address, **names)


def objects(address: str, prefix: str = "", bucket: str = "bucket") -> dict[str, bytes]:
    """Every object that is not empty, by its key."""
    store, found = client(address), {}
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    for item in (item for page in pages for item in page.get("Contents", [])):
        if item["Size"]:
            body = store.get_object(Bucket=bucket, Key=item["Key"])["Body"].read()
            found[item["Key"].removeprefix(prefix)] = body
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class FaultyProxy:
    """Passes requests on to a server, counts them, and does to each what `decide` says.

    `decide(number, method, path)` is called with the number of this request among those that change
    something (from 1; 0 for reads), before it is passed on; it may kill or stop the client itself.
    """

    def __init__(
        self, address: str, decide: Callable[[int, str, str], Fault], *, port: int = 0
    ) -> None:
        self.upstream = address.removeprefix("http://")
        self.decide = decide
        self.counts: Counter[str] = Counter()
        self.num_changes = 0
        self._lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                proxy.answer(self)

            do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = handle_one

            def log_message(self, *words: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *of: object) -> None:
                pass  # the client was killed

        self.server = Server(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        number = 0
        with self._lock:
            self.counts[handler.command] += 1
            if handler.command in ("PUT", "DELETE", "POST"):
                self.num_changes += 1
                number = self.num_changes
        fault = self.decide(number, handler.command, handler.path)
        if fault == "fail":
            self.reply(handler, 503, {}, b"")
            return
        status, headers, content = self.forward(handler, body)
        if fault == "repeat":
            status, headers, content = self.forward(handler, body)
        if fault == "lost":
            handler.close_connection = True
            handler.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "cut":
            headers["Content-Length"], handler.close_connection = str(len(content)), True
            content = content[: len(content) // 2]
        self.reply(handler, status, headers, content)

    def forward(
        self, handler: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self.upstream, timeout=60)
        try:
            upstream.request(handler.command, handler.path, body, dict(handler.headers))
            found = upstream.getresponse()
            return found.status, dict(found.getheaders()), found.read()
        finally:
            upstream.close()

    @staticmethod
    def reply(
        handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], content: bytes
    ) -> None:
        try:
            handler.send_response_only(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "transfer-encoding", "content-length"):
                    handler.send_header(name, value)
            length = headers.get("Content-Length", headers.get("content-length"))
            size = length or str(len(content))
            handler.send_header("Content-Length", size)
            handler.end_headers()
            if handler.command != "HEAD":
                handler.wfile.write(content)
        except OSError:
            handler.close_connection = True  # the client was killed


def in_environment(address: str) -> dict[str, str]:
    """The whole environment of a process that uses that server."""
    return {**os.environ, **environment(address)}
