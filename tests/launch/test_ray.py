"""Workers as Ray actors, in a real cluster of two raylets on this machine: they and the nodes come
and go, and the dataset is that of an undisturbed run."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from stream_engine.cli.main import main
from stream_engine.config import RunConfig
from stream_engine.errors import ConfigError, RoundOverError
from stream_engine.ranks import Rank
from stream_engine.run_dir.paths import RunDir
from stream_engine.work.ray_workers import RayPlaces, RayWorker, run_on_ray
from tests.conftest import DEMO_FLAGS, ROOT, answers
from tests.launch.holding import at_work, hold, rows_of_round, two_rounds
from tests.processes import run_rank
from tests.work.test_rounds import config_of
from tests.work.test_rounds import two_rounds as two_echo_rounds

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
NUM_SHARDS = 8


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray cluster of one node, with room for one worker."""
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is not installed")
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}",
    }.items():
        monkeypatch.setenv(name, value)
    folder = tempfile.mkdtemp(prefix="ray-")  # short, as names of sockets must be
    monkeypatch.setenv("RAY_TMPDIR", folder)
    os.mkdir(f"{folder}/ray")  # where it writes its address, and does not make the folder
    made = cluster_utils.Cluster(
        initialize_head=True, head_node_args={**NODE, "temp_dir": folder}, shutdown_at_exit=False
    )
    try:
        yield made
    finally:
        made.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def until(found: Callable[[], Any], driver: subprocess.Popen[str]) -> Any:
    """What `found` returns, as soon as it is something; the driver must run so long."""
    while driver.poll() is None:
        if result := found():
            return result
        time.sleep(0.01)
    raise AssertionError(driver.communicate()[0])


def test_actors_and_nodes_come_and_go_and_the_dataset_is_that_of_a_plain_run(
    cluster: Any, demo_run: Path, demo_questions: Path, tmp_path: Path
) -> None:
    """Two workers, and at first room for one. The test holds the shards back, so that each thing
    happens while there is work: an actor is killed at a shard, a node joins, and is lost while its
    worker is at a shard. Then other actors answer the next round of the run file."""
    run_dir = RunDir(tmp_path / "run")
    words = [*DEMO_FLAGS, "--dataset_path", demo_questions, "--work_dir", run_dir.root]
    assert run_rank(["shard", *words], log=tmp_path / "log") == 0, (tmp_path / "log").read_text()
    held = [hold(run_dir, index) for index in range(NUM_SHARDS)]
    command = [sys.executable, "-m", "stream_engine", "run", *DEMO_FLAGS]
    config = ["--config", str(two_rounds(tmp_path, demo_questions))]
    driver = subprocess.Popen(
        [*command, *config, "--launcher", "ray", "--num_workers", "2"],
        env=os.environ | {"RAY_ADDRESS": cluster.address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        held.pop().release()
        (alone,) = until(lambda: at_work(run_dir), driver)
        os.kill(alone.pid, signal.SIGKILL)

        joined = cluster.add_node(**NODE)
        until(lambda: run_dir.result("rewards", NUM_SHARDS - 1).exists(), driver)
        until(lambda: any(runs_on(joined, pid) for pid in workers(run_dir)), driver)
        elsewhere = [pid for pid in workers(run_dir) if not runs_on(joined, pid)]
        send(elsewhere, signal.SIGSTOP)  # so that the shard goes to the new node
        held.pop().release()
        until(lambda: any(runs_on(joined, lease.pid) for lease in at_work(run_dir)), driver)
        cluster.remove_node(joined, allow_graceful=False)
        send(elsewhere, signal.SIGCONT)
    finally:
        for lease in held:
            lease.release()
    output = driver.communicate(timeout=240)[0]
    assert driver.returncode == 0, output
    assert "samples: 24 = 24 done + 0 quarantined + 0 pending" in output
    assert "samples: 27 = 27 done + 0 quarantined + 0 pending" in output
    found = answers(Path(str(run_dir.root)))
    assert len(found) == 27 and found.items() >= answers(demo_run).items()
    assert rows_of_round(run_dir.dataset_dir, 1) == rows_of_round(demo_run / "dataset", 1)
    assert rows_of_round(run_dir.dataset_dir, 2)


def workers(run_dir: RunDir) -> set[int]:
    """The processes that have logged anything as workers."""
    logs = [path.read_text() for path in run_dir.logs_dir.glob("rank-[12]-*")]
    return {int(pid) for log in logs for pid in re.findall(r" rank\d+@\S+:(\d+) ", log)}


def send(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def runs_on(node: Any, pid: int) -> bool:
    """Whether a process is one of that node's raylet."""
    raylet = node.all_processes["raylet"][0].process.pid
    try:
        return raylet in [parent.pid for parent in psutil.Process(pid).parents()]
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        pytest.param(["--num_workers=2"], "--num_workers goes with --launcher ray", id="alone"),
        pytest.param(
            ["--launcher=ray", "--num_workers=0"], "--num_workers must be at least 1", id="none"
        ),
        pytest.param(
            ["--launcher=ray", "--worker_resources=spot"], "write name=amount", id="resources"
        ),
        pytest.param(["--launcher=slurm"], "invalid choice: 'slurm'", id="unknown"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(
    flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "--demo", "--work_dir", str(tmp_path / "run"), *flags]) == 1
    output = capsys.readouterr().err
    assert said in output and output.count("\n") == 1
    assert not (tmp_path / "run/run.json").exists()


def test_what_ray_cannot_do_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig(work_dir=str(tmp_path / "run"), dataset_path=("x.parquet",))
    parallel = dataclasses.replace(config, tensor_parallel=2)
    with pytest.raises(ConfigError, match="tensor_parallel is 2"):
        run_on_ray(parallel, RayPlaces())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        run_on_ray(config, RayPlaces())
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match=r"pip install 'stream-engine-dpo\[ray\]'"):
        run_on_ray(config, RayPlaces())


@pytest.mark.usefixtures("echo")
def test_a_worker_tells_that_its_round_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two drivers may be at one run. A worker did not know its round: settings of the one before
    were changed ones to it, which ended the run."""
    second = two_echo_rounds(tmp_path)
    first = dataclasses.replace(second, temperature=config_of(tmp_path).temperature)
    with pytest.raises(RoundOverError):
        run_on_ray(first, RayPlaces(), show_progress=False, number=1)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "0")  # so that what the worker sets is taken back
    ended = {
        number: RayWorker(1).work(config.to_dict(), ("shard", "work"), number, os.getcwd(), 1, 0.0)
        for number, config in ((1, first), (2, second))
    }
    assert ended[1]["is_round_over"] and "gone on from round 1" in ended[1]["error"]
    assert ended[2]["error"] is None


@pytest.mark.parametrize(
    ("gpus_per_worker", "sharing"),
    [pytest.param(1.0, 1, id="a-gpu-each"), pytest.param(0.25, 4, id="a-quarter-each")],
)
def test_a_worker_has_the_gpu_that_ray_gives_it_to_itself(
    gpus_per_worker: float, sharing: int
) -> None:
    """It sees no other: all workers of the run were taken to share it, and a worker of 64 planned
    its batches for a 64th of its memory."""
    rank = Rank.from_environment(RayWorker(3).environment(64, gpus_per_worker))
    assert rank.ranks_per_device(1) == sharing


@pytest.mark.parametrize(
    ("places", "cluster", "expected"),
    [
        pytest.param({}, {"CPU": 6.0, "GPU": 4.0}, (4, 1.0), id="a-gpu-each"),
        pytest.param({"cpus_per_worker": 4}, {"CPU": 6.0, "GPU": 4.0}, (1, 1.0), id="few-cores"),
        pytest.param({}, {"CPU": 3.0}, (3, 0.0), id="no-gpus"),
        pytest.param({"resources": {"spot": 1}}, {"CPU": 8.0}, (1, 0.0), id="no-room-yet"),
        pytest.param({"num_workers": 9}, {"CPU": 2.0}, (9, 0.0), id="more-than-fit"),
    ],
)
def test_as_many_workers_as_fit(
    places: dict[str, Any], cluster: dict[str, float], expected: tuple[int, float]
) -> None:
    found = RayPlaces(**places).within(cluster)
    assert (found.num_workers, found.gpus_per_worker) == expected
