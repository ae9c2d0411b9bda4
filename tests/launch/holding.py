"""Shards that a test holds, so that workers stand where it wants them; and those at work."""

from __future__ import annotations

from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.state import shard_lease
from stream_engine.store.leases import Lease, LeaseInfo, list_leases


def hold(run_dir: RunDir, index: int) -> Lease:
    lease = Lease.acquire(run_dir.leases_dir, shard_lease(index), worker_id="test", timeout_s=600)
    assert lease is not None
    return lease


def at_work(run_dir: RunDir) -> list[LeaseInfo]:
    """The leases that workers hold on shards."""
    return [
        lease
        for lease in list_leases(run_dir.leases_dir)
        if lease.name.startswith("shard") and lease.worker_id != "test" and lease.is_alive
    ]
