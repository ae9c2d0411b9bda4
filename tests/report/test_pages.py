"""The report in a real browser: it opens from a disk and from a server, every pair is reached, and
what it shows is what is stored."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.run_dir.results import read_results
from tests.report.conftest import PIPELINES
from tests.report.watched import entries_of, index_of, served, watched

RunOf = Callable[[str], Path]


def address_of(report: Path, page: str = "pairs.html") -> str:
    return (report / page).as_uri()


@pytest.fixture
def report(run_of: RunOf) -> Path:
    """The report that a dpo_reward run wrote at its end."""
    return run_of("dpo_reward") / "report"


@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("page", ["index.html", "pairs.html"])
def test_a_page_opens_from_a_disk_and_asks_nobody_for_anything(
    pipeline: str, page: str, run_of: RunOf, browser: Any
) -> None:
    folder = run_of(pipeline) / "report"
    with watched(browser) as seen:
        seen.open(address_of(folder, page))
        seen.page.wait_for_load_state("networkidle")
        assert len(seen.requests) > 3
        inside = folder.as_uri() + "/"
        assert [url for url in seen.requests if not url.startswith((inside, "data:,"))] == []


def test_it_opens_from_a_web_server(report: Path, browser: Any) -> None:
    with served(report) as address, watched(browser) as seen:
        page = seen.open(f"{address}/index.html")
        page.click("text=Largest margin >> xpath=ancestor::details >> a >> nth=0")
        found = seen.shown_pair()
        assert "largest margin" in entries_of(report)[found]["tags"]
        others = [u for u in seen.requests if not u.startswith((f"{address}/", "data:,"))]
        assert others == []


def test_a_reason_in_the_flow_leads_to_pairs_that_it_dropped(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        page = seen.open(address_of(report, "index.html"))
        page.click(".flow a >> text=max pairs per sample")
        seen.shown_pair()
        fates = page.evaluate("() => state.matching.map((line) => line.fate)")
        assert set(fates) == {"max_pairs_per_sample"}


def test_every_pair_is_reached_by_the_keyboard(report: Path, browser: Any) -> None:
    ids = [line["id"] for line in index_of(report)]
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        reached = [seen.shown_pair()]
        for _ in ids[1:]:
            page.keyboard.press("j")
            reached.append(seen.shown_pair())
        assert reached == ids and len(ids) > 40
        assert page.is_disabled("#next")
        page.keyboard.press("ArrowRight")
        assert seen.shown_pair() == ids[-1]
        page.keyboard.press("k")
        assert seen.shown_pair() == ids[-2]


def test_keys_typed_into_a_filter_do_not_leave_the_pair(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        first = seen.shown_pair()
        page.keyboard.press("/")
        assert page.evaluate("() => document.activeElement.name") == "text"
        page.keyboard.type("is")
        assert page.input_value("[name=text]") == "is"
        page.keyboard.press("ArrowRight")
        assert seen.shown_pair() == first


@pytest.mark.parametrize(
    ("values", "matches"),
    [
        pytest.param({"text": "CIRCLE"}, lambda line: "circle" in line["text"], id="text"),
        pytest.param(
            {"fate": "max_pairs_per_sample"},
            lambda line: line["fate"] == "max_pairs_per_sample",
            id="reason",
        ),
        pytest.param({"tag": "longest"}, lambda line: "longest" in line["tags"], id="extreme"),
        pytest.param(
            {"least": "4", "most": "6.5"},
            lambda line: line["margin"] is not None and 4 <= line["margin"] <= 6.5,
            id="margin",
        ),
        pytest.param({"text": "no such text"}, lambda line: False, id="nothing"),
    ],
)
def test_filters_show_what_matches(
    values: dict[str, str],
    matches: Callable[[dict[str, Any]], bool],
    report: Path,
    browser: Any,
) -> None:
    expected = [line["id"] for line in index_of(report) if matches(line)]
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        seen.shown_pair()
        for name, value in values.items():
            field = page.locator(f"[name={name}]")
            if field.evaluate("node => node.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
        assert page.evaluate("() => state.matching.map((line) => line.id)") == expected
        links = page.locator("#list a").evaluate_all("nodes => nodes.map((n) => n.dataset.id)")
        assert links == expected[:100]
        if expected:
            assert seen.shown_pair() == expected[0]
            link = page.url
            page.goto("about:blank")
            seen.open(link)
            assert page.evaluate("() => state.matching.map((line) => line.id)") == expected
        else:
            assert "Nothing matches" in page.inner_text("#pair")
            page.click("text=Clear filters")
            assert seen.shown_pair() == index_of(report)[0]["id"]


def test_the_order_can_be_by_margin(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        page.select_option("[name=sort]", "margin-up")
        margins = page.evaluate("() => state.matching.map((line) => line.margin)")
        assert margins == sorted(margins) and len(set(margins)) > 10


def test_a_link_to_one_pair_opens_it_for_somebody_else(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        for _ in range(3):
            page.keyboard.press("j")
        found = seen.shown_pair()
        page.click("#copy")
        page.wait_for_selector("text=/Copied|address bar/")
        link = page.url
    with watched(browser) as seen:
        seen.open(link)
        assert seen.shown_pair() == found


def test_a_link_to_a_pair_that_was_not_drawn_says_how_to_see_it(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        page = seen.open(address_of(report) + "#pair=<b>unknown</b>")
        assert "stream-engine show" in page.inner_text("#pair")
        assert "<b>unknown</b>" in page.inner_text("#pair")


def test_the_heat_map_holds_the_stored_log_probs(report: Path, run_of: RunOf, browser: Any) -> None:
    results = run_of("dpo_reward") / "results"
    rollouts = {
        record.key: {answer.index: answer for answer in record.answers}
        for path in sorted((results / "rollouts").glob("*.msgpack"))
        for record in read_results(path, SampleRollouts)
    }
    rewards = {
        record.key: {score.index: score for score in record.scores}
        for path in sorted((results / "rewards").glob("*.msgpack"))
        for record in read_results(path, SampleRewards)
    }
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        for _ in range(6):
            key, *indices = seen.shown_pair().split("-")
            boxes = page.locator(".heat").evaluate_all(HEAT_VALUES)
            for index, box in zip(map(int, indices), boxes, strict=True):
                answer, score = rollouts[key][index], rewards[key][index]
                assert box["reward"] == score.token_logps
                assert box["instruct"] == answer.scored_logps
                assert box["text"].removesuffix("</s>").strip() == answer.text
            page.keyboard.press("j")


HEAT_VALUES = """boxes => boxes.map((box) => ({
  reward: [...box.children].map((span) => Number(span.dataset.reward)),
  instruct: [...box.children].map((span) => Number(span.dataset.instruct)),
  text: box.textContent,
}))"""


def test_a_token_tells_both_log_probs_by_pointer_and_by_keys(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        seen.shown_pair()
        token = page.locator(".heat span").nth(2)
        token.hover()
        said = page.inner_text(".readout")
        assert token.inner_text().strip() in said
        numbers = [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", said)[-3:]]
        stored = (
            float(token.get_attribute("data-reward")),
            float(token.get_attribute("data-instruct")),
        )
        assert numbers == pytest.approx([*stored, stored[0] - stored[1]], rel=1e-3)
        page.locator(".heat").first.focus()
        page.keyboard.press("ArrowRight")
        assert page.inner_text(".readout") != said


def test_facts_and_their_probabilities_are_shown(run_of: RunOf, browser: Any) -> None:
    report = run_of("divide_and_conquer") / "report"
    entries = entries_of(report)
    with watched(browser) as seen:
        page = seen.open(address_of(report))
        entry = entries[seen.shown_pair()]
        answers = {answer["index"]: answer for answer in entry["answers"]}
        for name in ("chosen", "rejected"):
            facts = answers[entry[name]["index"]]["facts"]
            table = page.locator(f".side.{name} .facts tbody tr")
            rows = table.evaluate_all("rows => rows.map((row) => row.innerText)")
            assert len(rows) == len(facts) > 0
            for fact, row in zip(facts, rows):
                assert fact["fact"] in row and fact["question"] in row
                assert f"{fact['p_yes']:.3f}" in row and f"{fact['p_no']:.3f}" in row
                assert ("holds" if fact["holds"] else "denied") in row


def test_the_critics_words_are_shown_in_both_orders(run_of: RunOf, browser: Any) -> None:
    report = run_of("llava_critic") / "report"
    entries = entries_of(report)
    entry = next(entry for entry in entries.values() if entry["critiques"])
    with watched(browser) as seen:
        page = seen.open(address_of(report) + f"#pair={entry['id']}")
        assert seen.shown_pair() == entry["id"]
        words = page.inner_text("[aria-labelledby=critic]")
        orders = [(one["first"], one["second"]) for one in entry["critiques"]]
        pair = (entry["chosen"]["index"], entry["rejected"]["index"])
        assert orders == [pair, pair[::-1]]
        for one in entry["critiques"]:
            assert one["reply"] in words and one["reply"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("page", ["index.html", "pairs.html"])
def test_axe_finds_no_serious_fault(
    page: str, pipeline: str, scheme: str, run_of: RunOf, browser: Any
) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with watched(browser, color_scheme=scheme) as seen:
        opened = seen.open(address_of(run_of(pipeline) / "report", page))
        if page == "pairs.html":
            seen.shown_pair()
        opened.evaluate("() => document.querySelectorAll('details').forEach((d) => d.open = true)")
        result = Axe().run(opened, options={"preload": False})  # else it asks for the style
    faults = [
        (fault["id"], fault["impact"], [node["html"][:120] for node in fault["nodes"][:3]])
        for fault in result.response["violations"]
        if fault["impact"] in ("serious", "critical")
    ]
    assert faults == []
    assert len(result.response["passes"]) > 15


def test_the_colours_follow_the_system_and_the_button(report: Path, browser: Any) -> None:
    brightness = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    with watched(browser, color_scheme="dark") as seen:
        page = seen.open(address_of(report, "index.html"))
        assert max(page.evaluate(brightness)) < 60
        page.click("#theme")
        assert page.get_attribute("#theme", "aria-label") == "Colours: light"
        assert min(page.evaluate(brightness)) > 200
        page.reload()
        assert min(page.evaluate(brightness)) > 200


@pytest.mark.parametrize("page", ["index.html", "pairs.html"])
def test_nothing_moves_while_it_loads(page: str, report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        opened = seen.open(address_of(report, page))
        opened.wait_for_load_state("networkidle")
        shifts = opened.evaluate(LAYOUT_SHIFTS)
        assert sum(shifts) < 0.01, shifts


LAYOUT_SHIFTS = """() => new Promise((resolve) => {
  const found = [];
  new PerformanceObserver((list) => found.push(...list.getEntries().map((one) => one.value)))
    .observe({ type: "layout-shift", buffered: true });
  setTimeout(() => resolve(found), 300);
})"""


WIDTH = "() => document.documentElement.scrollWidth"
LARGE_NUMBERS = """() => document.querySelectorAll("td.number")
  .forEach((cell) => { cell.textContent = "123,456,789" })"""


def test_it_is_readable_on_a_small_screen(report: Path, browser: Any) -> None:
    with watched(browser) as seen:
        seen.page.set_viewport_size({"width": 390, "height": 800})
        for page in ("index.html", "pairs.html"):
            opened = seen.open(address_of(report, page))
            assert opened.evaluate(WIDTH) <= 390
            opened.evaluate(LARGE_NUMBERS)
            assert opened.evaluate(WIDTH) <= 390
