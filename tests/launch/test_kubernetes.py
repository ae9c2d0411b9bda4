"""launch/k8s.yaml by Kubernetes' own schemas and the rules that these do not tell; and the image.

No cluster and no container runtime is needed: what a pod's command says is run as it stands.
"""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

VERSION = "1.33"
DOCKERFILE = ROOT / "launch/Dockerfile"


@pytest.fixture
def job() -> Any:
    return yaml.safe_load((ROOT / "launch/k8s.yaml").read_text())


def container(job: Any) -> Any:
    (found,) = job["spec"]["template"]["spec"]["containers"]
    return found


def test_the_job_is_what_kubernetes_takes(job: Any) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="no schemas of Kubernetes")
    validator.validate(job, VERSION, strict=True)
    broken = copy.deepcopy(job)
    broken["spec"]["backofLimitPerIndex"] = 8
    with pytest.raises(validator.ValidationError):
        validator.validate(broken, VERSION, strict=True)


def test_the_job_keeps_the_rules_that_no_schema_tells(job: Any) -> None:
    """Those by which the API server refuses a Job whose fields are all right one by one."""
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and "backoffLimit" not in spec
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy and backoffLimitPerIndex ask for it
    assert 0 < spec["parallelism"] <= spec["completions"]
    named = {rule["onExitCodes"]["containerName"] for rule in exit_rules(spec)}
    assert named == {container(job)["name"]}
    mounted = {mount["name"] for mount in container(job)["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def exit_rules(spec: Any) -> list[Any]:
    return [rule for rule in spec["podFailurePolicy"]["rules"] if "onExitCodes" in rule]


def test_a_pod_with_a_wrong_setting_ends_with_the_status_that_is_not_tried_again(
    job: Any, tmp_path: Path
) -> None:
    given = [arg for arg in container(job)["args"] if not arg.startswith("--work_dir")]
    done = subprocess.run(
        [*container(job)["command"], *given, f"--work_dir={tmp_path / 'run'}", "--sample_k=2"],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    (rule,) = exit_rules(job["spec"])
    assert rule["action"] == "FailIndex" and done.returncode in rule["onExitCodes"]["values"]
    assert done.stderr == (
        "stream-engine: rank 3 needs at least 6 answers, sample_k is 2; give --rank 1 or "
        "--sample_k 6\n"
    )


def steps(kind: str) -> list[str]:
    """The instructions of that kind in the Dockerfile."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.partition(" ")[2] for line in text.splitlines() if line.startswith(f"{kind} ")]


def test_the_image_is_made_by_what_readme_says_of_files_that_are_there() -> None:
    readme = (ROOT / "README.md").read_text()
    (install,) = [step for step in steps("RUN") if step.startswith("pip")]
    assert re.sub(r" --\S+", "", install) in readme
    copied = [name for step in steps("COPY") for name in shlex.split(step)[:-1]]
    assert all((ROOT / name).exists() for name in copied), copied
    project = (ROOT / "pyproject.toml").read_text()
    assert {"pyproject.toml", *re.findall(r'readme = "(.*)"', project)} <= set(copied)
    (user,) = steps("USER")
    assert f"useradd --create-home {user}" in steps("RUN")
