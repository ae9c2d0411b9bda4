"""Pairs in a terminal: what they say, how the picture comes, and that ids find them."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from stream_engine.cli.main import main
from stream_engine.report.run import ReportedRun
from stream_engine.report.terminal import blocks, by_iterm, by_kitty, image_protocol, show_pairs
from tests.report.watched import entries_of


def shown(run: Path, wanted: str | None = None, *, limit: int = 3, colours: bool = False) -> str:
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=colours, color_system="truecolor")
    console = console if colours else Console(file=out, width=120)
    show_pairs(ReportedRun.open(run), wanted, limit=limit, console=console)
    return out.getvalue()


def png(size: tuple[int, int], colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_a_pair_is_found_by_the_id_that_the_report_gives_it(
    demo_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = next(e for e in entries_of(demo_run / "report").values() if e["chosen"])
    assert main(["show", str(demo_run), entry["id"]]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert entry["id"] in printed and f"margin {entry['margin']:.4g}" in printed
    texts = {answer["index"]: answer["text"] for answer in entry["answers"]}
    for name in ("chosen", "rejected"):
        assert " ".join(texts[entry[name]["index"]].split()) in printed


@pytest.mark.parametrize("field", ["key", "idx"])
def test_a_sample_shows_all_its_candidates(field: str, demo_run: Path) -> None:
    entry = next(e for e in entries_of(demo_run / "report").values() if e["fate"] != "kept")
    printed = shown(demo_run, entry[field])
    assert entry["id"] in printed and entry["fate"] in printed
    assert printed.count(entry["question"]) == 1


def test_without_an_id_the_first_pairs_are_shown(demo_run: Path) -> None:
    assert len(re.findall(r"[0-9a-f]{32}-\d+-\d+   kept", shown(demo_run, limit=4))) == 4


def test_an_unknown_id_is_a_users_error(demo_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(demo_run), "nobody"]) == 1
    assert "is called 'nobody'" in capsys.readouterr().err


def test_own_words_are_coloured_and_the_picture_is_drawn(demo_run: Path) -> None:
    printed = shown(demo_run, limit=1, colours=True)
    assert "\x1b[4;32m" in printed and "\x1b[4;31m" in printed
    assert printed.count("▀") >= 32 * 16
    assert "▀" not in shown(demo_run, limit=1)


def test_blocks_hold_two_pixels_a_character() -> None:
    text = blocks(png((3, 5), (10, 20, 30)), 8)
    assert text.plain == "▀▀▀\n▀▀▀\n▀▀▀"
    styles = {str(span.style) for span in text.spans}
    assert styles == {"#0a141e on #0a141e", "#0a141e"}  # the last line has no lower half


def test_critic_and_facts_are_printed(run_of) -> None:  # type: ignore[no-untyped-def]
    critic = run_of("llava_critic")
    entry = next(e for e in entries_of(critic / "report").values() if e["critiques"])
    printed = " ".join(shown(critic, entry["id"]).split())
    assert all(" ".join(one["reply"].split()) in printed for one in entry["critiques"])
    divided = run_of("divide_and_conquer")
    entry = next(e for e in entries_of(divided / "report").values() if e["chosen"])
    printed = shown(divided, entry["id"])
    assert all(fact["fact"] in printed for fact in entry["answers"][0]["facts"])


@pytest.mark.parametrize(
    ("environment", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "kitty"),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "WezTerm"}, "iterm"),
        ({"TERM": "xterm-256color"}, ""),
        ({"TERM": "tmux-256color", "TERM_PROGRAM": "WezTerm", "TMUX": "x"}, ""),
    ],
)
def test_the_image_protocol_is_told_from_the_environment(
    environment: dict[str, str], protocol: str
) -> None:
    assert image_protocol(environment) == protocol


def test_protocols_carry_the_whole_picture() -> None:
    picture = bytes(range(256)) * 40
    pieces = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", by_kitty(picture))
    assert [head for head, _ in pieces] == ["a=T,f=100,m=1", "m=1", "m=1", "m=0"]
    assert base64.b64decode("".join(data for _, data in pieces)) == picture
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);[^:]*:(.*)\x07", by_iterm(picture))
    assert found and int(found[1]) == len(picture)
    assert base64.b64decode(found[2]) == picture
