"""Settings as flags and files: names, defaults, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from stream_engine.cli.command import LineParser, normalise, refuse_unknown
from stream_engine.cli.flags import (
    add_settings,
    boolean_flags,
    read_settings,
)
from stream_engine.cli.main import COMMANDS, command_of, main
from stream_engine.config import RunConfig, names_of
from stream_engine.errors import ConfigError
from tests.conftest import ROOT

README = ROOT / "README.md"
OF_OTHER_PROGRAMS = {
    "--array",
    "--help",
    "--minutes",
    "--nodes",
    "--nproc_per_node",
    "--signal",
}

ANCESTOR_FLAGS = (
    "--reward_model_name r --reward_model_path /r --instruct_model_name i --instruct_model_path /i "
    "--dataset_path d.parquet --work_dir w --pipeline_name llava_critic --run_stage 1 "
    "--sample_k 8 --rank 2 --distance 30 --strict_follow_rank "
    "--reward_model_python_path critic_env --debug"
)


def settings_of(*words: str, base: dict[str, Any] | None = None) -> dict[str, Any]:
    parser = LineParser(prog="test")
    add_settings(parser)
    args, unknown = parser.parse_known_args(normalise(words, boolean_flags()))
    refuse_unknown(unknown, parser)
    return read_settings(args, base)


def config_of(*words: str) -> RunConfig:
    return RunConfig.create(settings_of(*words))


def test_the_ancestors_flags_keep_their_names() -> None:
    config = config_of(*ANCESTOR_FLAGS.split())
    assert (config.sample_k, config.rank, config.distance, config.run_stage) == (8, 2, 30, 1)
    assert config.strict_follow_rank and config.debug
    assert config.dataset_path == ("d.parquet",)
    assert config.reward_model_python_path == "critic_env"


def test_the_ancestors_defaults_hold() -> None:
    config = config_of()
    assert (config.sample_k, config.rank, config.distance, config.run_stage) == (10, 3, 25, None)
    assert not config.strict_follow_rank and not config.debug


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        pytest.param(("--sample-k", "6"), "sample_k", 6, id="dashes"),
        pytest.param(("--sample-k=6",), "sample_k", 6, id="dashes-equals"),
        pytest.param(("--output_dir", "x"), "work_dir", "x", id="alias"),
        pytest.param(("--format", "rlaifv,trl"), "format", ("rlaifv", "trl"), id="commas"),
        pytest.param(
            ("--format=trl", "--format", "rlaifv"), "format", ("trl", "rlaifv"), id="twice"
        ),
        pytest.param(("--debug", "True"), "debug", True, id="true"),
        pytest.param(("--debug=false",), "debug", False, id="false"),
        pytest.param(("--debug", "--no-debug"), "debug", False, id="no"),
        pytest.param(("--top_k", "none"), "top_k", None, id="none"),
        pytest.param(("--max_samples=5",), "max_samples", 5, id="optional"),
        pytest.param(("--local_rank=1", "--seed", "4"), "seed", 4, id="deepspeed"),
        pytest.param(("--local-rank=1", "--seed", "4"), "seed", 4, id="old-torchrun"),
    ],
)
def test_a_flag_is_understood(words: tuple[str, ...], name: str, value: object) -> None:
    assert getattr(config_of(*words), name) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(("--samplek", "3"), "did you mean '--sample_k'", id="misspelt"),
        pytest.param(("--sample_k", "many"), "--sample_k 'many'", id="not-a-number"),
        pytest.param(("--dtype", "fp4"), "choose from auto, float32", id="not-a-choice"),
        pytest.param(("--sample_k", "4"), "rank 3 needs at least 6 answers", id="rule"),
        pytest.param(("--pipeline_name", "dpo_rewards"), "mean 'dpo_reward'", id="pipeline"),
        pytest.param(
            ("--critic_pairs", "all"), "belongs to --pipeline_name llava_critic", id="other"
        ),
        pytest.param(("a.parquet",), "separated by commas", id="shell-glob"),
        pytest.param(("--seed",), "expected one argument", id="no-value"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(*words)


def test_every_setting_has_a_flag_that_sets_it() -> None:
    parser = LineParser(prog="test")
    add_settings(parser)
    flags = {action.dest: action.option_strings for action in parser._actions}
    for name in set(names_of(RunConfig)) - {"pipeline_options"}:
        assert f"--{name}" in flags[name]


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        ("yaml", "sample-k: 6\nrank: 2\nformat: [trl]\ncritic_pairs: swiss\n"),
        ("toml", 'sample_k = 6\nrank = 2\nformat = ["trl"]\ncritic_pairs = "swiss"\n'),
    ],
)
def test_a_config_file_takes_the_same_names_and_flags_win(
    tmp_path: Path, suffix: str, text: str
) -> None:
    path = tmp_path / f"run.{suffix}"
    path.write_text(text)
    words = ("--config", str(path), "--pipeline_name", "llava_critic", "--rank", "1")
    config = config_of(*words)
    assert (config.sample_k, config.rank, config.format) == (6, 1, ("trl",))
    assert config.pipeline_options == {"critic_pairs": "swiss"}


def test_an_unknown_name_in_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("sample_kk: 6\n")
    with pytest.raises(ConfigError, match=r"run\.yaml: unknown setting 'sample_kk'.*'sample_k'"):
        config_of("--config", str(tmp_path / "run.yaml"))


def test_a_pipelines_own_options_are_flags() -> None:
    config = config_of("--pipeline_name", "llava_critic", "--critic-pairs", "swiss")
    assert config.pipeline_options == {"critic_pairs": "swiss"}


def test_options_of_a_former_pipeline_are_left_behind() -> None:
    base = {"pipeline_name": "llava_critic", "pipeline_options": {"critic_pairs": "swiss"}}
    settings = settings_of("--pipeline_name", "dpo_reward", base=base)
    assert settings["pipeline_options"] == {}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([command, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert COMMANDS[command].summary.split()[0] in shown
    assert command_of(command).notes.strip() in shown


def test_flags_that_readme_and_the_help_tell_of_exist(capsys: pytest.CaptureFixture[str]) -> None:
    shown = ""
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown += capsys.readouterr().out.partition("\noptions:")[2]
    flags = set(re.findall(r"^  (--\w+)|, (--\w+)", shown, re.MULTILINE))
    told = " ".join(command_of(name).notes for name in COMMANDS)
    told += re.sub("python -m tests.benchmarks.*?`", "", README.read_text())
    told += (README.parent / "launch/README.md").read_text()
    unknown = set(re.findall(r"--\w+", told)) - {flag for pair in flags for flag in pair}
    assert unknown - OF_OTHER_PROGRAMS == set()


def test_help_documents_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "A lease without a heartbeat for this long may be taken over. (default 60.0)" in text
    assert "only with --pipeline_name llava_critic" in text


def test_every_setting_has_words_of_its_own_in_the_help() -> None:
    parser = LineParser(prog="test")
    add_settings(parser)
    assert [a.dest for a in parser._actions if a.help is None or not a.help.strip()] == []
    bare = [a.dest for a in parser._actions if str(a.help).strip().startswith("(default")]
    assert bare == []
