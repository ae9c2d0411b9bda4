"""Texts that mean harm are shown and do nothing: in the pages, in their files, in the terminal."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from stream_engine.report.entries import MAX_SHOWN
from stream_engine.report.site import write_report
from stream_engine.report.terminal import show_pairs
from tests.report.hostile import OVERRIDE, TEXTS, ZERO_WIDTH, hostile_run
from tests.report.watched import entries_of, index_of, watched

LOADED = {"theme.js", "pairs.js", "data/index.js"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "run"
    write_report(hostile_run(folder), num_rows=1000)
    return folder / "report"


class Tags(HTMLParser):
    """The elements of a page, with their attributes."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.mark.parametrize("name", ["index.html", "pairs.html"])
def test_the_files_hold_no_inline_script_style_or_foreign_address(name: str, report: Path) -> None:
    tags = Tags(report / name).found
    scripts = [attributes.get("src") for tag, attributes in tags if tag == "script"]
    assert set(scripts) <= LOADED and "theme.js" in scripts
    for tag, attributes in tags:
        assert tag not in ("style", "iframe", "object", "embed", "base")
        assert [key for key in attributes if key.startswith("on") or key == "style"] == []
        for key in ("src", "href"):
            value = attributes.get(key) or ""
            assert re.fullmatch(r"[\w./-]*(#[\w=%+&.-]*)?|data:,", value), (tag, key, value)


@pytest.mark.parametrize("name", ["index.html", "pairs.html"])
def test_the_policy_allows_nothing_from_elsewhere(name: str, report: Path) -> None:
    metas = [attributes for tag, attributes in Tags(report / name).found if tag == "meta"]
    [policy] = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules.pop("default-src") == "'none'"
    sources = {source for values in rules.values() for source in values.split()}
    assert sources == {"'self'", "'none'", "data:"}


@pytest.mark.parametrize("page", ["index.html", "pairs.html"])
def test_nothing_runs_on_any_page_or_pair(page: str, report: Path, browser: Any) -> None:
    ids = [line["id"] for line in index_of(report)]
    with watched(browser) as seen:
        opened = seen.open((report / page).as_uri())
        for _ in ids if page == "pairs.html" else ():
            seen.shown_pair()
            opened.evaluate("() => document.querySelectorAll('details').forEach((d) => d.open = 1)")
            opened.keyboard.press("j")
        foreign = "#pair :is(script, a, svg, style, iframe, b), #pair [onclick], #pair [onerror]"
        assert opened.locator(foreign).count() == 0
        assert opened.locator("#pair img").evaluate_all(
            "all => all.every((i) => i.naturalWidth > 0)"
        )
        assert opened.evaluate("() => window.harmed") is None
        assert opened.evaluate("() => getComputedStyle(document.body).display") != "none"
        inside = report.as_uri()
        assert [url for url in seen.requests if not url.startswith((inside, "data:,"))] == []


def test_every_text_is_shown_as_it_is(report: Path, browser: Any) -> None:
    entries = entries_of(report)
    questions = {entry["question"] for entry in entries.values()}
    assert {text for text in TEXTS if len(text) < MAX_SHOWN} <= questions
    with watched(browser) as seen:
        for number, text in enumerate(TEXTS[:5]):
            found = next(e for e in entries.values() if e["question"] == text and e["chosen"])
            page = seen.open((report / "pairs.html").as_uri() + f"#pair={found['id']}")
            page.reload()
            seen.shown_pair()
            assert page.inner_text("#question") == text, number
            assert text in page.locator(".answers .text").all_text_contents()[0] or text in "".join(
                page.locator(".answers .text").all_text_contents()
            )


def test_characters_that_nobody_sees_are_shown_by_their_numbers(report: Path, browser: Any) -> None:
    found = next(e for e in entries_of(report).values() if OVERRIDE in e["question"])
    with watched(browser) as seen:
        page = seen.open((report / "pairs.html").as_uri() + f"#pair={found['id']}")
        seen.shown_pair()
        said = page.inner_text("#question")
        assert "U+202E" in said and "U+200B" in said and "U+2066" in said and "U+FEFF" in said
        whole = page.locator("body").inner_text()
        assert OVERRIDE not in whole and ZERO_WIDTH not in whole


def test_a_megabyte_is_cut_and_says_so(report: Path) -> None:
    entries = entries_of(report)
    [long] = {e["question"] for e in entries.values() if e["question"].startswith("megabyte")}
    assert len(long) < MAX_SHOWN + 100 and "more characters]" in long
    assert max(path.stat().st_size for path in report.rglob("*")) < 30_000_000


def test_the_terminal_obeys_no_text(tmp_path: Path) -> None:
    run = hostile_run(tmp_path / "run")
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, highlight=False)
    show_pairs(run, None, limit=1000, console=console)
    printed = out.getvalue()
    assert "window.harmed" in printed and "\\x1b]0;title\\x07" in printed
    own = re.sub(r"\x1b\[[\d;]*m", "", printed)
    assert [c for c in own if not (c.isprintable() or c == "\n")] == []
