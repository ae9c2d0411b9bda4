"""RunState: which shards are done, failed, held or pending. Derived from the files, each time.

Workers, `status` and the merge ask the same object, so that they cannot disagree. A refresh lists
folders and opens only files that it has not seen complete; where few of many shards are left, a
worker's looks ask for the files of these alone, however many the run has.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from math import inf

from stream_engine.config import STAGES, Stage
from stream_engine.errors import ShardReadError
from stream_engine.run_dir.failures import ShardFailure, read_failure
from stream_engine.run_dir.headers import FEW, MANY, KeptHeaders, Seen
from stream_engine.run_dir.manifest import Manifest, Shard
from stream_engine.run_dir.paths import RunDir
from stream_engine.run_dir.results import ResultHeader, read_header
from stream_engine.run_dir.rounds import Fingerprints, firsts_on_file
from stream_engine.store import files
from stream_engine.store.base import Entry, Location, Version
from stream_engine.store.leases import Holder, LeaseInfo, list_leases
from stream_engine.timing import spent_on

logger = logging.getLogger(__name__)

SHARD_LEASE = "shard-"
FEW_LEFT = 32
SHARDS_PER_FEW = 256
"""Files are asked for by name when they are at most one in so many, and at most `FEW_LEFT`."""


def shard_lease(index: int) -> str:
    """The lease of a shard: one for all its stages, since they follow one another."""
    return f"{SHARD_LEASE}{index:06d}"


class RunState:
    """State of a run as of the last `refresh`. Counts are of shards unless they say samples."""

    def __init__(
        self,
        run_dir: RunDir,
        fingerprints: Mapping[Stage, str],
        *,
        max_shard_retries: int,
        keeps_headers: bool = False,
    ) -> None:
        """`keeps_headers` says that what was read of many results is written down for others."""
        self.run_dir = run_dir
        self.fingerprints = Fingerprints.given(fingerprints)
        self.max_shard_retries = max_shard_retries
        self.shards: list[Shard] = []
        self.manifest = Manifest(run_dir)
        self.failures: dict[int, ShardFailure] = {}
        self.leases: list[LeaseInfo] = []
        self.highest_result = -1  # the highest number that a result file has
        self._seen: dict[Stage, dict[int, Seen]] = {stage: {} for stage in STAGES}
        self._missing: dict[Stage, dict[str, Shard]] = {stage: {} for stage in STAGES}
        self._aside: dict[Stage, dict[int, int]] = {stage: {} for stage in STAGES}
        self._kept = {stage: KeptHeaders(run_dir, stage) for stage in STAGES}
        self.keeps_headers = keeps_headers
        self._holders: dict[str, tuple[Version, Holder]] = {}
        self._clock = (0.0, 0.0)
        self._refreshed = float("-inf")
        self._refresh_cost_s = 0.0

    @spent_on("looking")
    def refresh(
        self, *, max_age_s: float = 0.0, longest_age_s: float = inf, only_missing: bool = False
    ) -> RunState:
        """Look at the files again, unless that was done within `max_age_s`.

        Where looking is slow (many shards, a network file system) that age is stretched, at
        most to `longest_age_s`, so that a worker spends at most a twentieth of its time here. With
        `max_age_s` or `only_missing` results that were complete are not looked at: nobody but
        `retry-failed` takes one away.
        """
        started = time.monotonic()
        slow_s = min(20 * self._refresh_cost_s, longest_age_s)
        if max_age_s and started - self._refreshed < max(max_age_s, slow_s):
            return self
        only_missing = only_missing or max_age_s > 0
        self._refresh_manifest()
        for stage in STAGES:
            self._refresh_results(stage, only_missing=only_missing)
        self._refresh_failures(only_missing=only_missing)
        self._refresh_leases(only_missing=only_missing)
        self._refreshed = time.monotonic()
        self._refresh_cost_s = self._refreshed - started
        return self

    def refresh_shard(self, shard: Shard) -> None:
        """Look at the files of one shard again."""
        for stage in STAGES:
            self._look(stage, shard, files.stat(self.run_dir.result(stage, shard.index)))
            self._note(stage, shard)
        failure = read_failure(self.run_dir, shard.index)
        self.failures.pop(shard.index, None)
        if failure is not None:
            self.failures[shard.index] = failure

    def header(self, stage: Stage, shard: Shard) -> ResultHeader | None:
        """The header of a shard's result when it is of this shard and its round's settings.

        It may cover a part of the samples only, after `retry-failed`; see `is_complete`.
        """
        seen = self._seen[stage].get(shard.index)
        if seen is None or seen.header is None:
            return None
        header = seen.header
        fits = header.shard_sha256 == shard.sha256
        is_current = header.fingerprint == self.fingerprints.of(shard.index)[stage]
        return header if fits and is_current else None

    def is_complete(self, stage: Stage, shard: Shard) -> bool:
        """Whether every sample that reaches this stage has a result or is quarantined."""
        header = self.header(stage, shard)
        if header is None:
            return False
        if stage == "rollouts":
            return header.num_samples == shard.num_samples
        before = self.header("rollouts", shard)
        return (
            before is not None
            and before.num_samples == shard.num_samples
            and header.num_samples == before.num_results
        )

    def failure(self, shard: Shard) -> ShardFailure | None:
        """The failure on file, if it is of these settings and its stage is not done since.

        A damaged tar stays one whether or not the results made from it are complete.
        """
        failure = self.failures.get(shard.index)
        if failure is None:
            return None
        if failure.fingerprint != self.fingerprints.of(shard.index)[failure.stage]:
            return None
        is_mended = failure.damaged != "tar" and self.is_complete(failure.stage, shard)
        return None if is_mended else failure

    def is_failed(self, shard: Shard) -> bool:
        """Whether the shard was tried as often as allowed."""
        failure = self.failure(shard)
        return failure is not None and failure.is_final(self.max_shard_retries)

    def is_settled(self, stages: Sequence[Stage], shard: Shard) -> bool:
        """Whether nothing is left to do at these stages: done, or failed for good."""
        return all(self.is_complete(stage, shard) for stage in stages) or self.is_failed(shard)

    def headers(self, *stages: Stage) -> Iterator[ResultHeader]:
        """The headers of all results of these stages, else of every stage, stage by stage."""
        found = (self.header(stage, shard) for stage in stages or STAGES for shard in self.shards)
        return (header for header in found if header is not None)

    def holders(self) -> dict[int, LeaseInfo]:
        """Live leases on shards, by the shard's index."""
        return {
            int(lease.name.removeprefix(SHARD_LEASE)): lease
            for lease in self.leases
            if lease.name.startswith(SHARD_LEASE)
        }

    def wait_s(self, shard: Shard) -> float:
        """Seconds until a shard that failed may be tried again; 0 when it may be now."""
        failure = self.failure(shard)
        return 0.0 if failure is None else max(0.0, failure.retry_at - self.now())

    def now(self) -> float:
        """The time by the store's clock, which stamped what is compared with it."""
        at, ticks = self._clock
        return at + time.monotonic() - ticks

    def num_quarantined(self, stage: Stage) -> int:
        """Samples that a stage set aside."""
        return sum(self._aside[stage].values())

    def unsettled(self, stages: Sequence[Stage]) -> dict[int, Shard]:
        """The shards with something left to do at these stages, by their index."""
        left = (self.shards[index] for index in sorted(self.missing(stages)))
        return {shard.index: shard for shard in left if not self.is_failed(shard)}

    def missing(self, stages: Sequence[Stage]) -> set[int]:
        """The shards that lack a complete result of one of these stages, failed ones included."""
        return {shard.index for stage in stages for shard in self._missing[stage].values()}

    def is_left(self, stages: Sequence[Stage], index: int) -> bool:
        """Whether a shard is `unsettled` at these stages."""
        name = self.run_dir.result_name(index)
        is_missing = any(name in self._missing[stage] for stage in stages)
        return is_missing and not self.is_failed(self.shards[index])

    @property
    def most_missing(self) -> int:
        """Results that are missing, of the stage that lacks most."""
        return max(len(missing) for missing in self._missing.values())

    def asks_by_name(self, num_files: int) -> bool:
        """Whether so many files of a folder are few of many: asked for one by one, not listed."""
        return num_files <= min(FEW_LEFT, len(self.shards) // SHARDS_PER_FEW)

    def num_rejected(self) -> int:
        """Records that ingest rejected, over all inputs."""
        return sum(sum(info.rejected.values()) for info in self.manifest.inputs.values())

    def _refresh_manifest(self) -> None:
        """Take up new shards, but for those of a round that has begun since: they have settings
        that this state does not know, and whoever holds it is through with its own."""
        self.manifest.refresh()
        new = self.manifest.slim[len(self.shards) :]
        # A round is in run.json before a shard of it is cut.
        if new and (begun := self.fingerprints.first_of_next(firsts_on_file(self.run_dir))):
            new = new[: max(0, begun - len(self.shards))]
        for shard in new:
            self.shards.append(shard)
            for stage in STAGES:
                self._missing[stage][self.run_dir.result_name(shard.index)] = shard

    def _refresh_results(self, stage: Stage, *, only_missing: bool) -> None:
        """Read the headers of results that are new, or were not complete the last time."""
        missing, seen = self._missing[stage], self._seen[stage]
        folder = self.run_dir.results_dir(stage)
        if only_missing:
            found = self._look_for(folder, missing.keys())
        else:
            found = files.list_files(folder)
            self._forget_all_but(stage, by_index(found))
        unread = [(missing[entry.name], entry) for entry in found if entry.name in missing]
        if len(unread) > FEW:
            kept = self._kept[stage].refresh()
            for shard, entry in unread:
                known = kept.get(shard.index)
                if known is not None and known.version == entry.version:
                    seen[shard.index] = known
        num_read = sum(self._look(stage, shard, entry) for shard, entry in unread)
        for shard, _ in unread:
            self._note(stage, shard)
        if self.keeps_headers and num_read >= MANY:
            self._kept[stage].keep(seen)

    def _forget_all_but(self, stage: Stage, present: Mapping[int, Entry]) -> None:
        """Forget what is known of results that were taken away."""
        self.highest_result = max(self.highest_result, max(present, default=-1))
        for index in self._seen[stage].keys() - present.keys():
            del self._seen[stage][index]
            for one in STAGES:  # rewards are complete only beside their rollouts
                self._note(one, self.shards[index])

    def _note(self, stage: Stage, shard: Shard) -> None:
        """Keep the lists of what is missing and what was set aside, when a result was looked at."""
        header = self.header(stage, shard)
        self._aside[stage].pop(shard.index, None)
        if header is not None and header.num_quarantined:
            self._aside[stage][shard.index] = header.num_quarantined
        name = self.run_dir.result_name(shard.index)
        if self.is_complete(stage, shard):
            self._missing[stage].pop(name, None)
        else:
            self._missing[stage][name] = shard

    def _look(self, stage: Stage, shard: Shard, entry: Entry | None) -> bool:
        """Read a result's header unless the file is as it was and could be read.

        One that could not may be whole: a network file system fails a read now and then. Returns
        whether the file was opened.
        """
        seen = self._seen[stage]
        if entry is None:
            seen.pop(shard.index, None)
            return False
        old = seen.get(shard.index)
        if old is not None and old.version == entry.version and old.header is not None:
            return False
        header = None
        try:
            header = read_header(entry)
        except ShardReadError as error:
            if old is None or old.version != entry.version:
                logger.warning("%s; if that stays so, it will be made again", error)
        seen[shard.index] = Seen(entry.version, header)
        return True

    def _look_for(self, folder: Location, names: Collection[str]) -> list[Entry]:
        """Those of these files that there are: one by one where they are few of many."""
        if not self.asks_by_name(len(names)):
            return files.list_files(folder, wanted=names.__contains__)
        found = (files.stat(folder / name) for name in sorted(names))
        return [entry for entry in found if entry is not None]

    def _refresh_leases(self, *, only_missing: bool) -> None:
        """See who holds what is left; `only_missing`: of the shards alone."""
        folder = self.run_dir.leases_dir
        self._clock = files.now(folder), time.monotonic()
        names = {self.run_dir.lease_name(shard_lease(i)) for i in self.missing(STAGES)}
        if only_missing:
            entries = self._look_for(folder, names)
        else:  # one that was given back leaves an empty file, which takes as long to look at
            entries = files.list_files(
                folder, wanted=lambda name: name in names or not name.startswith(SHARD_LEASE)
            )
        leases = list_leases(folder, now=self.now(), known=self._holders, entries=entries)
        self.leases = [lease for lease in leases if not lease.is_stale]

    def _refresh_failures(self, *, only_missing: bool) -> None:
        folder = self.run_dir.failures_dir
        if only_missing:
            left = self.missing(STAGES)
            found = self._look_for(folder, {self.run_dir.failure_name(index) for index in left})
        else:
            left = set(self.failures)
            found = files.list_files(folder)
        present = by_index(found)
        for index in self.failures.keys() & left - present.keys():
            del self.failures[index]
        for index, entry in present.items():
            if index in self.failures and self.failures[index].version == entry.version:
                continue
            failure = read_failure(self.run_dir, index)
            if failure is not None:
                self.failures[index] = failure
            else:
                self.failures.pop(index, None)


def numbered(folder: Location) -> list[tuple[int, Entry]]:
    """The files of a folder that are named by a shard's index, in order."""
    return list(by_index(files.list_files(folder)).items())


def by_index(found: Iterable[Entry]) -> dict[int, Entry]:
    """Those of some files that are named by a shard's index, in order."""
    stems = ((entry.name.rpartition(".")[0], entry) for entry in found)
    return dict(
        sorted(
            ((int(stem), entry) for stem, entry in stems if is_index(stem)),
            key=lambda one: one[0],
        )
    )


def is_index(stem: str) -> bool:
    """Whether a name is a shard's index as ours are written, and no copy's that somebody made."""
    return stem.isdecimal() and stem == f"{int(stem):06d}"
