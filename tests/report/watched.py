"""Pages of a report in a browser that are watched: what they log, what they ask for, what runs."""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request


class Watched:
    """A page and everything that it logged and asked for."""

    def __init__(self, page: Page) -> None:
        self.page = page
        self.logged: list[str] = []
        self.requests: list[str] = []
        self.dialogs: list[str] = []
        page.on("console", lambda message: self.logged.append(f"{message.type} {message.text}"))
        page.on("pageerror", lambda error: self.logged.append(f"error {error}"))
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("requestfailed", self.note_failed)
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))

    def note_failed(self, request: Request) -> None:
        """Of a request that the browser itself ended, since the page was left, nobody is told."""
        if request.failure != "net::ERR_ABORTED":
            self.logged.append(f"failed {request.url}: {request.failure}")

    def open(self, address: str) -> Page:
        """Go to an address and wait until it shows a pair, or the overview."""
        self.page.goto(address)
        self.page.wait_for_selector("#pair h1, .figures")
        return self.page

    def shown_pair(self) -> str:
        """The id of the pair on the page, once it is the one that is marked in the list."""
        self.page.wait_for_function(
            "() => typeof state !== 'undefined'"  # a page that was just gone to has no script yet
            " && state.current && state.current.id === state.wanted"
            " && document.querySelector('#pair dl').textContent.includes(state.wanted)"
        )
        return self.page.evaluate("() => state.current.id")


@contextmanager
def watched(browser: Browser, **options: Any) -> Iterator[Watched]:
    """A page of its own, closed at the end; nothing may be logged and no dialog opened."""
    context = browser.new_context(viewport={"width": 1366, "height": 800}, **options)
    try:
        found = Watched(context.new_page())
        yield found
        assert found.logged == [], found.logged
        assert found.dialogs == [], found.dialogs
    finally:
        context.close()


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a web server on this machine that serves a folder."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def index_of(report: Path) -> list[dict[str, Any]]:
    """The lines of a report's index, in order."""
    return called_with(report / "data/index.js", "loadIndex")[0]


def entries_of(report: Path) -> dict[str, dict[str, Any]]:
    """All entries of a report, by id."""
    return {
        entry["id"]: entry
        for path in sorted((report / "data").glob("pairs-*.js"))
        for entry in called_with(path, "loadPairs")[1]
    }


def called_with(path: Path, function: str) -> list[Any]:
    """The arguments in a script that calls one function."""
    text = path.read_text(encoding="utf-8")
    assert text.startswith(f"{function}(...") and text.endswith(");\n")
    return json.loads(text.removeprefix(f"{function}(...").removesuffix(");\n"))
