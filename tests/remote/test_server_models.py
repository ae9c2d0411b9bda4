"""Answers and judges of servers: what fails on the way loses nothing, and the key is kept nowhere.

The server is a stand-in (tests/chat_server.py), for its faults; a real one is asked in
test_real_server.py.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stream_engine.cli.main import main
from stream_engine.config import RunConfig
from stream_engine.engine import row_seed
from stream_engine.errors import ConfigError, StreamEngineError
from stream_engine.records import SampleRewards, SampleRollouts
from stream_engine.run_dir.damage import whole_manifest
from stream_engine.run_dir.failures import read_failure
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import read_results
from stream_engine.run_dir.run_json import read_run_file
from stream_engine.run_dir.shards import read_shard
from stream_engine.work.plan import plan_lines
from stream_engine.work.runner import RunReport, run
from tests.chat_server import ChatServer, running
from tests.conftest import write_questions

KEY = "sk-stand-in-0f1e2d3c"
SAMPLE_K = 3
EIGHT = [f"what is number {i} good for" for i in range(8)]
FAULTS = ("429", "500", "closed", "cut", "malformed", "empty")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with running() as server:
        server.key = KEY
        yield server


def settings(tmp_path: Path, server: ChatServer, questions: list[str], **more: Any) -> RunConfig:
    dataset = tmp_path / "questions.jsonl"
    if not dataset.exists():
        write_questions(dataset, questions)
    return RunConfig.create(
        {
            "pipeline_name": "llava_critic",
            "work_dir": str(tmp_path / "run"),
            "dataset_path": str(dataset),
            "sampler": server.model("drawer"),
            "reward_model_path": server.model("critic"),
            "format": "trl",
            "sample_k": SAMPLE_K,
            "rank": 1,
            "samples_per_shard": 4,
            "retry_backoff_s": 0.0,
            "server_backoff_s": 0.01,
            "server_retries": 3 * len(FAULTS),  # more are lost with connections that others cut
            "report": "never",
            **more,
        }
    )


def run_quietly(config: RunConfig) -> RunReport:
    return run(config, show_progress=False)


def results(work_dir: Path, stage: Any, kind: type) -> list[Any]:
    folder = RunDir(str(work_dir))
    shards = whole_manifest(folder).shards
    return [
        record for info in shards for record in read_results(folder.result(stage, info.index), kind)
    ]


def bytes_with(folder: Path, secret: str) -> list[Path]:
    """The files below a folder whose bytes hold a text."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert files
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_no_fault_of_a_server_loses_or_doubles_an_answer(
    tmp_path: Path, server: ChatServer
) -> None:
    server.faults = FAULTS
    report = run_quietly(settings(tmp_path, server, EIGHT, token_prices="sampler=1000000/0"))
    assert (report.exit_status, report.problems) == (0, [])
    assert report.status.samples.done == 8
    found = results(tmp_path / "run", "rollouts", SampleRollouts)
    assert len({record.key for record in found}) == len(found) == 8
    for record in found:
        seeds = [row_seed(0, record.key, j) for j in range(SAMPLE_K)]
        assert [answer.text for answer in record.answers] == [f"It is number {s}." for s in seeds]
        assert {answer.model for answer in record.answers} == {"drawer"}
    assert set(server.answered.values()) == {1}, "a request that was answered was sent again"
    assert min(server.asked.values()) > len(FAULTS)
    for record in results(tmp_path / "run", "rewards", SampleRewards):
        counts = [score.scores for score in record.scores]
        assert sorted(count["wins"] - count["losses"] for count in counts) == [-2, 0, 2]
    used = report.status.servers["sampler"]
    assert (used.requests, used.prompt_tokens) == (24, 7 * 24)
    assert used.cost == 7 * 24
    assert used.model == "drawer"
    assert report.status.servers["critic"].requests == 8 * 6
    assert report.status.pairs.written > 0


def test_the_key_is_in_no_file(
    tmp_path: Path, server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not even when a server repeats it, as this one does when it refuses another."""
    server.faults = ("500",)
    run_quietly(settings(tmp_path, server, [*EIGHT, "poison"], server_retries=1))
    assert bytes_with(tmp_path, "the worker died"), "else nothing of the server is kept at all"
    server.key = "another"
    with pytest.raises(ConfigError) as caught:
        run_quietly(settings(tmp_path, server, EIGHT, work_dir=str(tmp_path / "second")))
    assert KEY not in str(caught.value)
    assert bytes_with(tmp_path, KEY) == []
    assert KEY not in "".join(capsys.readouterr())


def test_a_refused_key_ends_the_run_in_one_line_and_is_not_tried_again(
    tmp_path: Path, server: ChatServer
) -> None:
    server.key = "another"
    with pytest.raises(ConfigError, match="refuses the key") as caught:
        run_quietly(settings(tmp_path, server, EIGHT, server_requests=1))
    assert "\n" not in str(caught.value)
    assert set(server.asked.values()) == {1}
    assert sum(server.asked.values()) == 1


@pytest.mark.parametrize(
    ("question", "reason"),
    [("poison", "server_error"), ("refused", "prompt_too_long"), ("filtered", "content_filter")],
)
def test_a_record_whose_request_fails_for_good_is_set_aside_by_its_reason(
    tmp_path: Path, server: ChatServer, question: str, reason: str
) -> None:
    report = run_quietly(settings(tmp_path, server, [*EIGHT, question], server_retries=2))
    samples = report.status.samples
    assert (samples.total, samples.done, samples.quarantined) == (9, 8, 1)
    assert report.exit_status == 2
    [problem] = report.problems
    assert f"(idx 8): {reason}" in problem


def test_a_slow_answer_is_asked_for_again(tmp_path: Path, server: ChatServer) -> None:
    server.faults = ("slow",)
    config = settings(
        tmp_path, server, EIGHT[:1], server_timeout_s=0.5, pipeline_name="llava_critic"
    )
    report = run_quietly(config)
    assert (report.status.samples.done, report.problems) == (1, [])
    assert set(server.asked.values()) == {2}


def test_a_server_that_is_down_fails_shards_and_no_record(
    tmp_path: Path, server: ChatServer
) -> None:
    server.is_down = True
    config = settings(tmp_path, server, EIGHT, server_retries=1, max_shard_retries=1)
    config = replace(config, samples_per_shard=2)
    with pytest.raises(StreamEngineError, match=r"drawer\) does not answer"):
        run_quietly(config)
    failures = [read_failure(RunDir(tmp_path / "run"), shard) for shard in range(4)]
    given_up = [failure for failure in failures if failure and failure.is_final(max_retries=1)]
    assert len(given_up) == 2, "the other two shards may be tried again"
    assert not list((tmp_path / "run" / "quarantine").rglob("*.jsonl"))
    server.is_down = False
    assert main(["retry-failed", str(tmp_path / "run")]) == 0
    found = results(tmp_path / "run", "rollouts", SampleRollouts)
    assert len({record.key for record in found}) == len(found) == 8


def test_the_server_may_move_and_the_model_may_not_change(
    tmp_path: Path, server: ChatServer
) -> None:
    run_quietly(settings(tmp_path, server, EIGHT))
    num_asked = sum(server.asked.values())
    with running() as moved:
        report = run_quietly(
            settings(
                *(tmp_path, server, EIGHT),
                sampler=moved.model("drawer"),
                reward_model_path=moved.model("critic"),
            )
        )
        assert report.shards_done_here == 0
        assert sum(moved.asked.values()) == 0
    assert sum(server.asked.values()) == num_asked
    with pytest.raises(ConfigError, match="openai:drawer -> openai:other"):
        run_quietly(settings(tmp_path, server, EIGHT, sampler=server.model("other")))


def test_requests_at_once_are_limited(tmp_path: Path, server: ChatServer) -> None:
    run_quietly(settings(tmp_path, server, EIGHT, server_requests=2))
    assert 1 <= server.most_at_once <= 2


def test_pictures_go_as_data_urls_and_seeds_are_those_of_the_answers(
    tmp_path: Path, server: ChatServer
) -> None:
    run_quietly(settings(tmp_path, server, EIGHT[:1], top_p=0.5))
    first = server.bodies[0]
    image, text = first["messages"][0]["content"]
    assert image["image_url"]["url"].startswith("data:image/png;base64,")
    assert text == {"type": "text", "text": EIGHT[0]}
    assert (first["model"], first["top_p"], first["max_tokens"]) == ("drawer", 0.5, 512)
    assert "top_k" not in first
    folder = RunDir(str(tmp_path / "run"))
    [info] = whole_manifest(folder).shards
    [sample] = read_shard(folder.shard(0), info)
    drawn = [body["seed"] for body in server.bodies if body["model"] == "drawer"]
    assert sorted(drawn) == sorted(row_seed(0, sample.key, j) for j in range(SAMPLE_K))


def test_a_format_with_log_probs_needs_the_instruct_model(
    tmp_path: Path, server: ChatServer
) -> None:
    with pytest.raises(ConfigError, match="format rlaifv holds the instruct model's log-probs"):
        run_quietly(settings(tmp_path, server, EIGHT, format="rlaifv"))


def test_the_plan_names_the_servers_and_asks_them_nothing(
    tmp_path: Path, server: ChatServer
) -> None:
    lines = list(plan_lines(settings(tmp_path, server, EIGHT)))
    named = [line for line in lines if line.startswith("server ")]
    assert [line.split()[1] for line in named] == ["sampler:", "critic:"]
    assert f"drawer at {server.url} for rollouts" in named[0]
    assert not server.asked


@pytest.mark.parametrize(
    "name",
    [
        "openai:http://user:secret@host/v1#m",
        "openai:http://host/v1?key=secret#m",
    ],
)
def test_a_name_that_holds_a_secret_is_refused_unseen(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RunConfig.create({"sampler": name})
    assert "secret" not in str(caught.value)


def test_what_run_json_keeps_of_a_server(tmp_path: Path, server: ChatServer) -> None:
    run_quietly(settings(tmp_path, server, EIGHT[:2]))
    kept = read_run_file(RunDir(str(tmp_path / "run")))
    assert kept.settings["sampler"] == server.model("drawer")
    inputs = kept.stages["rollouts"].inputs
    assert inputs["sampler checkpoint"] == "openai:drawer"
    assert server.url not in json.dumps(inputs)
    assert Counter(said["server"] for said in kept.engines.values()) == {server.url: 2}


def test_a_server_that_takes_no_seed_is_asked_without(tmp_path: Path, server: ChatServer) -> None:
    server.unknown_fields = ("seed",)
    report = run_quietly(settings(tmp_path, server, EIGHT[:4], server_requests=1))
    assert (report.problems, report.status.samples.done) == ([], 4)
    assert sum("seed" in body for body in server.bodies) == 1


def test_settings_that_a_server_refuses_end_the_run(tmp_path: Path, server: ChatServer) -> None:
    """And set no record aside: it would refuse them all."""
    server.unknown_fields = ("top_k",)
    with pytest.raises(ConfigError, match="refuses whatever it is asked with these settings"):
        run_quietly(settings(tmp_path, server, EIGHT, top_k=5))


def test_facts_are_checked_by_the_likeliest_tokens_that_a_server_tells(
    tmp_path: Path, server: ChatServer
) -> None:
    judges = ",".join([server.model("judge"), server.model("questions"), server.model("split")])
    config = settings(
        *(tmp_path, server, EIGHT[:2]),
        pipeline_name="divide_and_conquer",
        reward_model_path=judges,
    )
    run_quietly(config)
    found = results(tmp_path / "run", "rewards", SampleRewards)
    facts = [fact for r in found for s in r.scores for fact in s.details.get("facts", [])]
    assert len(facts) == 2 * SAMPLE_K
    assert {(fact["holds"], fact["p_yes"], fact["p_no"]) for fact in facts} == {
        (True, 0.606531, 0.22313)
    }
    server.gives_logprobs = False
    with pytest.raises(ConfigError, match="gives no top_logprobs"):
        run_quietly(replace(config, work_dir=str(tmp_path / "second")))
