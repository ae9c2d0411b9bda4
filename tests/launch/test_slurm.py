"""launch/slurm.sbatch under a real Slurm: a controller and two nodes, all on this machine.

Slurm is private: configuration, key, ports and state are the test's own. Debian's `slurm-wlm` does.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from stream_engine.run_dir.paths import RunDir
from tests.conftest import DEMO_FLAGS, ROOT, answers, parts
from tests.launch.holding import at_work, hold
from tests.processes import run_rank

NUM_SHARDS = 8
PATIENCE_S = 500.0
SETTLED_S = 5.0
NODES = ("node0", "node1")
CONFIGURATION = """\
ClusterName=trial
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
NodeName=node0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=spare Nodes=node0,node1 Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node0,node1 PriorityTier=10 PreemptMode=OFF
"""


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Slurm of two nodes with one core each; commands of Slurm find it by SLURM_CONF."""
    if os.getuid() != 0:
        pytest.skip("a private Slurm is started by root alone")
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: apt-get install slurm-wlm")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    (folder / "munge").mkdir()
    (folder / "state").mkdir()
    folder.chmod(0o755)
    key = folder / "munge/key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    host = socket.gethostname().partition(".")[0]
    configuration = CONFIGURATION.format(host=host, ports=free_ports(3), folder=folder)
    (folder / "slurm.conf").write_text(configuration)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    munge = [f"--{name}-file={folder}/munge/{name}" for name in ("key", "pid", "log", "seed")]
    commands = [
        ["munged", "--foreground", f"--socket={folder}/munge/socket", *munge],
        ["slurmctld", "-D"],
        *(["slurmd", "-D", "-N", node] for node in NODES),
    ]
    daemons = []
    try:
        with (folder / "daemons.log").open("w") as log:
            for command in commands:
                daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
                if command[0] == "munged":
                    until((folder / "munge/socket").exists)
        until(lambda: said_by("sinfo", "-h", "-p", "spare", "-o", "%T %D").strip() == "idle 2")
        yield folder
    finally:
        said_by("scancel", "--user=root")
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(timeout=60)
        for process in steps_of(""):
            with suppress(psutil.Error):
                process.kill()
        shutil.rmtree(folder, ignore_errors=True)


def said_by(*command: object) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False).stdout


def until(found: Callable[[], Any], *, but: Callable[[], str] = str) -> Any:
    """What `found` returns, as soon as it is something; `but` tells what there is instead."""
    last = time.monotonic() + PATIENCE_S
    while time.monotonic() < last:
        if result := found():
            return result
        time.sleep(0.05)
    raise AssertionError(but())


def test_jobs_of_an_array_are_preempted_and_die_and_the_dataset_is_that_of_a_plain_run(
    slurm: Path, demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """The test holds the shards back, so that each thing happens while there is work: the job of
    one node is preempted at a shard, which it gives back; all of the other's processes are killed
    at a shard. Both are queued again."""
    run_dir = RunDir(tmp_path / "run")
    words = [*DEMO_FLAGS, "--dataset_path", str(demo_questions), "--work_dir", str(run_dir.root)]
    assert run_rank(["shard", *words], log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    held = [hold(run_dir, index) for index in range(NUM_SHARDS)]
    log = tmp_path / "slurm-%a.log"
    options = [f"--output={log}", "--gpus-per-node=0", "--cpus-per-task=1", "--array=0-1"]
    config = tmp_path / "run.yaml"
    rounds = [{"dataset_path": str(demo_questions)}]
    config.write_text(json.dumps({"work_dir": str(run_dir.root), "rounds": rounds}))
    job = submit(*options, "launch/slurm.sbatch", *DEMO_FLAGS, "--config", str(config))

    def state() -> str:
        logs = [path.read_text() for path in sorted(tmp_path.glob("slurm-*.log"))]
        logs.append(said_by("scontrol", "show", "job", job))
        return "\n".join([*logs, *map(str, at_work(run_dir))])

    try:
        held.pop().release()
        (first,) = until(lambda: at_work(run_dir), but=state)
        node = environment(first.pid)["SLURMD_NODENAME"]
        urgent = submit(
            "--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 600"
        )
        until(lambda: first.pid not in [one.pid for one in at_work(run_dir)], but=state)
        assert not list(run_dir.failures_dir.glob("*")), "a lease was left behind"
        until(lambda: said_by("squeue", "-h", "-j", urgent, "-o", "%T").strip() == "RUNNING")

        held.pop().release()
        held.pop().release()
        (second,) = until(lambda: at_work(run_dir), but=state)
        assert environment(second.pid)["SLURMD_NODENAME"] != node
        kill_with_parent(second.pid)
        said_by("scancel", urgent)
    finally:
        for lease in held:
            lease.release()
    until(lambda: has_ended(job), but=state)
    shown = said_by("scontrol", "show", "job", job)
    assert shown.count("JobState=COMPLETED") == 2 and shown.count("Restarts=1") == 2, state()
    assert "ended by Slurm" in state()
    assert answers(run_dir.root) == answers(demo_run)
    assert parts(run_dir.dataset_dir) == parts(demo_run / "dataset")


STUB = """#!/bin/sh
case "$*" in
    *torch.distributed.run*) exec sleep 600 ;;
    *status*) exit 1 ;;
esac
"""


def test_a_job_that_is_cancelled_is_not_queued_again(slurm: Path, tmp_path: Path) -> None:
    """In the place of python stands what never ends, and leaves work to do."""
    programs = tmp_path / "venv/bin"
    programs.mkdir(parents=True)
    for name in ("python", "stream-engine"):
        (programs / name).write_text(STUB)
        (programs / name).chmod(0o755)
    options = ["--output=/dev/null", "--gpus-per-node=0", "--cpus-per-task=1"]
    job = submit(*options, "launch/slurm.sbatch", venv=tmp_path / "venv")
    until(lambda: f"{job}.0" in said_by("squeue", "-h", "-s", "-j", job))
    said_by("scancel", job)
    until(lambda: not said_by("squeue", "-h", "-j", job).strip())
    until(lambda: not steps_of(job))
    shown = said_by("scontrol", "show", "job", job)
    assert "JobState=CANCELLED" in shown and "Restarts=0" in shown, shown


def submit(*words: str, venv: str | Path = sys.prefix) -> str:
    """The number of a new job."""
    done = subprocess.run(
        ["sbatch", "--parsable", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "VENV": str(venv)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def has_ended(job: str) -> bool:
    """Whether none of its jobs is queued.

    Slurm lets two minutes pass before it starts one again, since it refuses for some seconds
    whatever it told a node of the job before. The rest of them is cut short here.
    """
    for line in said_by("squeue", "-h", "-r", "-j", job, "-o", "%i %A %V %r").splitlines():
        name, number, queued, reason = line.split(maxsplit=3)
        age_s = (datetime.now() - datetime.fromisoformat(queued)).total_seconds()
        if reason == "BeginTime" and age_s > SETTLED_S and not steps_of(number):
            said_by("scontrol", "update", f"JobId={name}", "StartTime=now")
    return not said_by("squeue", "-h", "-j", job).strip()


def steps_of(number: str) -> list[psutil.Process]:
    """Processes of Slurm's that stand over a job's, of any job without a number."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = " ".join(process.cmdline())
            is_of_this_slurm = process.environ().get("SLURM_CONF") == os.environ["SLURM_CONF"]
            if line.startswith(f"slurmstepd: [{number}") and is_of_this_slurm:
                found.append(process)
    return found


def environment(pid: int) -> dict[str, str]:
    return psutil.Process(pid).environ()


def kill_with_parent(pid: int) -> None:
    """End a worker and the torchrun that would start it again."""
    for one in (psutil.Process(pid).ppid(), pid):
        with suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
