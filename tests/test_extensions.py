"""Third parties add families and pipelines by entry points: a package is built, installed, used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from stream_engine.records import SampleRewards
from stream_engine.run_dir.results import read_results
from tests.conftest import ROOT

GOLDEN = Path(__file__).parent / "data" / "golden" / "llava15"

FAMILY = '''
"""A model family: LLaVA-1.5 under another architecture's name."""

from stream_engine.models import llava


def matches(config):
    return config.get("architectures") == ["AcmeVisionForCausalLM"]


def load(checkpoint, config):
    model = llava.load(checkpoint, config)
    model.family = "acme"
    return model
'''

PIPELINE = '''
"""A pipeline: the longer answer is the better one."""

from stream_engine.pipelines.base import Pipeline
from stream_engine.pipelines.ranking import rank_by_wins
from stream_engine.records import AnswerScore, SampleRewards


class LongerIsBetter(Pipeline):
    name = "longer_is_better"

    def roles(self):
        return (self.instruct_role(),)

    def settings(self, stage):
        return {}

    def rewards(self, engines, samples):
        for sample, rollouts in samples:
            scores = [
                AnswerScore(index=a.index, score=float(len(a.token_ids))) for a in rollouts.answers
            ]
            yield SampleRewards(key=sample.key, scores=scores)

    def candidate_pairs(self, sample, rewards):
        return rank_by_wins(rewards, rank=self.config.rank)
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel `acme` installed by pip."""
    folder = tmp_path_factory.mktemp("acme")
    wheel = folder / "acme-1.0-py3-none-any.whl"
    info = "acme-1.0.dist-info"
    files = {
        "acme_family.py": FAMILY,
        "acme_pipeline.py": PIPELINE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: acme\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": (
            "[stream_engine.models]\nacme = acme_family\n\n"
            "[stream_engine.pipelines]\nlonger_is_better = acme_pipeline:LongerIsBetter\n"
        ),
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
        archive.writestr(f"{info}/RECORD", record)
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(wheel)], check=True)
    return target


def test_an_installed_package_brings_a_family_and_a_pipeline(
    installed: Path, demo_questions: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(GOLDEN / "checkpoint", checkpoint)
    shutil.copytree(GOLDEN / "openai", tmp_path / "openai")
    config = json.loads((checkpoint / "config.json").read_text())
    config["architectures"] = ["AcmeVisionForCausalLM"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    words = ["run", "--pipeline_name", "longer_is_better", "--instruct_model_path", checkpoint]
    words += ["--dataset_path", demo_questions, "--work_dir", tmp_path / "run", "--max_samples", 4]
    words += ["--sample_k", 4, "--rank", 2, "--max_new_tokens", 8]
    words += ["--failures_ok"]  # random weights never end an answer: all are as long, none wins

    def run(**environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "stream_engine", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        )

    without = run()
    assert without.returncode == 1
    assert "unknown pipeline 'longer_is_better'" in without.stderr
    done = run(PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "run/run.json").read_text())
    assert kept["engines"]["instruct"]["family"] == "acme"
    results = read_results(tmp_path / "run/results/rewards/000000.msgpack", SampleRewards)
    assert len(list(results)) == 4
