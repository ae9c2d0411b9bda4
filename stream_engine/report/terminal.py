"""Pairs in a terminal: the difference in colours, scores, and the picture.

Where the terminal has an image protocol (kitty's, or iTerm2's, which WezTerm has too) the picture
is sent by it; elsewhere it is drawn in blocks of two pixels a character. Foreign text is printed
without terminal controls.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator, Mapping
from itertools import groupby, islice
from typing import NamedTuple

from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.style import Style
from rich.table import Table
from rich.text import Text

from stream_engine.config import RankingConfig
from stream_engine.errors import ConfigError, RecordError
from stream_engine.pairs.filters import split_candidates
from stream_engine.pairs.rankings import rank, scored_answers
from stream_engine.pictures import pixels_of, small_picture
from stream_engine.records import Sample, ShardInfo
from stream_engine.report.difference import Segment
from stream_engine.report.entries import Entry, Side, entry_of, pair_id
from stream_engine.report.places import KEPT
from stream_engine.report.reading import samples_of
from stream_engine.report.run import ReportedRun
from stream_engine.report.survey import NO_CANDIDATE, why_no_candidate
from stream_engine.text import printable

BLOCK_COLUMNS = 32
NUMBER_COLUMNS = 36  # of a line, beside an answer in the table
PICTURE_SIDE = 512
CHUNK = 4096  # characters of one piece of kitty's protocol
PAIR = re.compile(r"(?P<key>[0-9a-f]{32})(-\d+-\d+)?")
COLOURS = {"chosen": "green", "rejected": "red"}


class Found(NamedTuple):
    """A pair to print, or a question without one, and its sample."""

    entry: Entry
    sample: Sample


def show_pairs(
    run: ReportedRun, wanted: str | None, *, limit: int, console: Console | None = None
) -> None:
    """Print the pair, or the pairs of the sample, that `wanted` names; without it the first ones.

    Raises:
        ConfigError: when the run has nothing of that name.
    """
    console = console or Console(highlight=False)
    protocol = image_protocol(os.environ) if console.is_terminal else ""
    found = named(run, wanted) if wanted else islice(kept(run), limit)
    num_shown = 0
    for _, group in groupby(found, key=lambda one: one.sample.key):
        for number, one in enumerate(group):
            if number == 0:
                print_question(console, one, protocol)
            print_pair(console, one.entry)
            num_shown += 1
    if not num_shown:
        what = f"no scored sample or pair is called {wanted!r}" if wanted else "no pair was made"
        raise ConfigError(f"{run.run_dir.root}: {what}")


def kept(run: ReportedRun) -> Iterator[Found]:
    """The pairs that pass the filters, in the order of the run."""
    for info in run.shards():
        yield from (one for one in of_shard(run, info, set(info.keys)) if one.entry.fate == KEPT)


def named(run: ReportedRun, wanted: str) -> Iterator[Found]:
    """All candidates of a sample, by its key or id; or the one pair that `wanted` is the id of."""
    match = PAIR.fullmatch(wanted)
    key = match["key"] if match else ""
    for info in run.shards():
        keys = {k for k, idx in zip(info.keys, info.ids) if k == key or wanted == idx}
        if keys:
            of_keys = of_shard(run, info, keys)
            is_pair = match is not None and wanted != key
            yield from (one for one in of_keys if not is_pair or one.entry.id == wanted)


def of_shard(run: ReportedRun, info: ShardInfo, keys: set[str]) -> Iterator[Found]:
    """The candidates of some samples of a shard, best first, each with what the filters say."""
    samples = samples_of(run.run_dir, info, keys)
    ranking = run.config.part(RankingConfig)
    for rollouts, rewards in scored_answers(run.run_dir, info):
        sample = samples.get(rollouts.key)
        if sample is None:
            continue
        passed, dropped = split_candidates(rank(run.pipeline, rollouts, rewards), ranking)
        fates = {pair_id(sample.key, candidate.pair): KEPT for candidate in passed}
        fates |= {pair_id(sample.key, candidate.pair): reason for candidate, reason in dropped}
        pairs = [candidate.pair for candidate in (*passed, *(one for one, _ in dropped))]
        for pair in pairs:
            fate = fates[pair_id(sample.key, pair)]
            found = Found(entry_of(sample, rollouts, rewards, pair, fate=fate), sample)
            found.entry.round = run.round_of(info.index)
            yield found
        if not pairs:
            fate = NO_CANDIDATE[why_no_candidate(rollouts, rewards)]
            yield Found(entry_of(sample, rollouts, rewards, None, fate=fate), sample)


def print_question(console: Console, one: Found, protocol: str) -> None:
    """A sample's picture and question."""
    entry, sample = one
    where = "" if entry.round is None else f"round {entry.round}  "
    title = f"{where}{entry.idx}  {entry.source}".strip()
    console.print(Rule(Text(printable(title, limit=200))))
    for image in sample.images:
        try:
            if protocol:
                small = small_picture(image.data, longest=PICTURE_SIDE, is_lossless=True)
                console.file.write(f"{PROTOCOLS[protocol](small.data)}\n")
            elif console.color_system is not None:
                console.print(Padding(blocks(image.data, BLOCK_COLUMNS), (0, 0, 1, 2)))
        except RecordError as error:
            console.print(Text(f"  (picture: {error})", style="dim"))
    console.print(Padding(Text(safe(entry.question), style="bold"), (0, 0, 1, 2)))


def print_pair(console: Console, entry: Entry) -> None:
    """A pair's two answers with what differs coloured, and the table of all answers."""
    margin = "" if entry.margin is None else f"   margin {entry.margin:.4g}"
    console.print(Text(f"  {entry.id}   {safe(entry.fate)}{margin}", style="dim"))
    answers = {answer.index: answer for answer in entry.answers}
    sides: list[tuple[str, Side]] = []
    if entry.chosen is not None and entry.rejected is not None:
        sides = [("chosen", entry.chosen), ("rejected", entry.rejected)]
    for name, side in sides:
        answer = answers[side.index]
        head = f"{name}  score {answer.score:.4g}, {answer.words} words"
        console.print(Padding(Text(head, style=f"bold {COLOURS[name]}"), (1, 0, 0, 2)))
        console.print(Padding(coloured(side.segments, COLOURS[name]), (0, 0, 0, 4)))
        for fact in answer.facts:
            console.print(Padding(fact_line(fact), (0, 0, 0, 4)))
    for critique in entry.critiques:
        head = f"critic, answer {critique.first} before {critique.second}: {safe(critique.verdict)}"
        console.print(Padding(Text(f"{head}\n{safe(critique.reply)}", style="dim"), (1, 0, 0, 4)))
    if entry.is_flip:
        console.print(
            Padding(Text("flip: the critic named one place in both orders"), (0, 0, 0, 4))
        )
    console.print(
        Padding(answers_table(entry, max(20, console.width - NUMBER_COLUMNS)), (1, 0, 1, 2))
    )


def coloured(segments: list[Segment], colour: str) -> Text:
    """A text whose own words, those that the other one has not, are coloured and underlined."""
    text = Text()
    for is_own, part in segments:
        text.append(safe(part), style=f"{colour} underline" if is_own else "")
    return text


def fact_line(fact: Mapping[str, object]) -> Text:
    sign, style = ("yes", "green") if fact["holds"] else ("no", "red")
    line = Text(f"{sign:>4} ", style=style)
    return line.append(f"p(yes) {fact['p_yes']:.3f}  {safe(str(fact['fact']))}", style="default")


def answers_table(entry: Entry, width: int) -> Table:
    """All answers, best first, each cut to so many columns."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("rank", "score", "words", "no."):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("answer", no_wrap=True)
    marks = {entry.chosen.index: "chosen"} if entry.chosen else {}
    marks |= {entry.rejected.index: "rejected"} if entry.rejected else {}
    for answer in entry.answers:
        score = safe(answer.unscored) if answer.score is None else f"{answer.score:.4g}"
        rank_shown = "-" if answer.rank is None else str(answer.rank)
        style = COLOURS.get(marks.get(answer.index, ""), "")
        cells: list[RenderableType] = [rank_shown, score, str(answer.words), str(answer.index)]
        table.add_row(*cells, Text(printable(answer.text, limit=width), style=style))
    return table


def blocks(data: bytes, columns: int) -> Text:
    """A picture as characters whose upper half is one pixel and whose lower half is another."""
    rows = pixels_of(data, longest=columns)
    text = Text()
    for upper, lower in zip(rows[::2], [*rows[1::2], None]):
        for x, above in enumerate(upper):
            below = None if lower is None else "#{:02x}{:02x}{:02x}".format(*lower[x])
            style = Style(color="#{:02x}{:02x}{:02x}".format(*above), bgcolor=below)
            text.append("▀", style=style)
        text.append("\n")
    text.rstrip()
    return text


def image_protocol(environment: Mapping[str, str]) -> str:
    """The image protocol of a terminal by what it says of itself; "" where none is known.

    Inside tmux and screen there is none, since they pass it on to nobody.
    """
    if "TMUX" in environment or environment.get("TERM", "").startswith(("screen", "tmux")):
        return ""
    if environment.get("TERM") in ("xterm-kitty", "xterm-ghostty"):
        return "kitty"
    if environment.get("TERM_PROGRAM") in ("iTerm.app", "WezTerm"):
        return "iterm"
    return ""


def by_kitty(png: bytes) -> str:
    """A picture as kitty's graphics protocol sends it, piece by piece."""
    encoded = base64.b64encode(png).decode()
    pieces = [encoded[i : i + CHUNK] for i in range(0, len(encoded), CHUNK)]
    found = []
    for number, piece in enumerate(pieces):
        first = "a=T,f=100," if number == 0 else ""
        found.append(f"\x1b_G{first}m={int(number < len(pieces) - 1)};{piece}\x1b\\")
    return "".join(found)


def by_iterm(png: bytes) -> str:
    """A picture as iTerm2's protocol sends it."""
    encoded = base64.b64encode(png).decode()
    return f"\x1b]1337;File=inline=1;size={len(png)};preserveAspectRatio=1:{encoded}\x07"


PROTOCOLS = {"kitty": by_kitty, "iterm": by_iterm}


def safe(text: str) -> str:
    """Text on its own lines, without what a terminal would obey."""
    return "\n".join(printable(line, limit=len(line)) for line in text.split("\n"))
