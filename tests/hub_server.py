"""A stand-in for the Hugging Face hub: it speaks what huggingface_hub asks of it over HTTP to fetch
a model and to push a dataset by git LFS, and keeps repositories in memory. Xet storage is not
spoken: tests switch it off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by `models/owner/name` or `datasets/owner/name`: their files by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.asked: Counter[str] = Counter()
        """How often each file was fetched, each object sent, each commit made."""
        self.failing_uploads = 0
        """So many uploads fail before one goes through."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class Answering(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            return self.info(found[1])
        if found := re.fullmatch(r"/api/(\w+/[^/]+/[^/]+)/tree/[^/]+.*", path):
            return self.tree(found[1])
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.file(f"{found[1] or 'models'}/{found[2]}", found[3])
        return self.answer(404, {"error": "Not found"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlparse(self.path).path)
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if path.endswith("/info/lfs/objects/batch"):
            return self.batch(json.loads(body))
        if path.startswith("/verify/"):
            return self.answer(200, {})
        if found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/preupload/[^/]+", path):
            return self.preupload(found[1], json.loads(body))
        if found := re.fullmatch(r"/api/(datasets/[^/]+/[^/]+)/commit/[^/]+", path):
            return self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        return self.answer(404, {"error": "Not found"})

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        if self.server.failing_uploads:
            self.server.failing_uploads -= 1
            return self.answer(403, {"error": "the link has expired"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.objects[oid] = body
        self.server.asked[f"object {oid}"] += 1
        return self.answer(200, {})

    # -- what is answered ------------------------------------------------------------------------

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def info(self, name: str) -> None:
        if name not in self.server.repositories:
            return self.answer(404, {"error": "Repository not found"})
        files = [{"rfilename": file} for file in self.server.repositories[name]]
        found = {"id": name.partition("/")[2], "sha": COMMIT, "siblings": files}
        return self.answer(200, found | {"private": self.server.private.get(name, False)})

    def tree(self, name: str) -> None:
        files = self.server.repositories.get(name)
        if files is None:
            return self.answer(404, {"error": "Repository not found"})
        found = [
            {"type": "file", "path": path, "size": len(data), "oid": oid_of(data)}
            for path, data in files.items()
        ]
        return self.answer(200, found)

    def file(self, name: str, path: str) -> None:
        data = self.server.repositories.get(name, {}).get(path)
        if data is None:
            return self.answer(404, {"error": "Entry not found"})
        if self.command == "GET":
            self.server.asked[f"file {path}"] += 1
        headers = {"ETag": f'"{oid_of(data)}"', "X-Repo-Commit": COMMIT}
        return self.answer(200, data, headers | {"Content-Type": "application/octet-stream"})

    def create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['type']}s/{asked.get('organization') or 'user'}/{asked['name']}"
        is_private = bool(asked.get("private")) or asked.get("visibility") == "private"
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, {})
        self.server.private.setdefault(name, is_private)
        return self.answer(status, {"url": f"{self.server.url}/{name}"})

    def preupload(self, name: str, asked: dict[str, Any]) -> None:
        """Small texts are regular files; oids are given of what is there already."""
        held = self.server.repositories[name]
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".parquet", ".jpg")) else "regular",
                "shouldIgnore": False,
                "oid": oid_of(held[file["path"]]) if file["path"] in held else None,
            }
            for file in asked["files"]
        ]
        return self.answer(200, {"files": files})

    def batch(self, asked: dict[str, Any]) -> None:
        """Where to send each object; nowhere if it is there."""
        objects = []
        for one in asked["objects"]:
            actions = {
                "upload": {"href": f"{self.server.url}/object/{one['oid']}"},
                "verify": {"href": f"{self.server.url}/verify/{one['oid']}"},
            }
            held = one["oid"] in self.server.objects
            objects.append(one if held else one | {"actions": actions})
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.server.asked["commit"] += 1
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        return self.answer(200, {"commitUrl": url, "commitOid": COMMIT})


def oid_of(data: bytes) -> str:
    """git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
