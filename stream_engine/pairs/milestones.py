"""What a merge had counted up to some shards, kept beside the rankings: the next goes on there.

    counted      the first pass over all shards: after an append only new ones are to be counted
    milestones   of each part of a dataset, the second pass up to the shard in which the part's last
                 row lies: where parts stay as they are, it begins there

Whether they still hold is told without a look at any pair. `chain_of` has a hash of what the
rankings of the first n shards are made from, which tells their pairs; and how many of each group
the balance drops tells which. The hash of both is the origin of a part that ends there.

All of it is derived: without these files, or with damaged ones, a merge begins at the beginning.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import msgspec

from stream_engine.errors import ChangedError
from stream_engine.outputs.formats.base import Split
from stream_engine.pairs import balance, statistics
from stream_engine.pairs.balance import BalanceCounts, Balances, Passed
from stream_engine.pairs.merge_inputs import MergeInputs
from stream_engine.pairs.rankings import hash_of_code
from stream_engine.pairs.statistics import PairStatistics, RunStatistics
from stream_engine.run_dir.sealed import keep_derived, read_derived
from stream_engine.store.base import Location

logger = logging.getLogger(__name__)

MAGIC = b"SEMILE\x00\x01"


def chain_of(inputs: MergeInputs, settings: str) -> list[str]:
    """Hashes of what the rankings of the first 0, 1, 2, ... shards are made from.

    Args:
        settings: hash of all that shapes a ranking but the results.
    """
    chain = [hash_of([settings, hash_of_code(balance), hash_of_code(statistics)])]
    for index, sha256, counts in inputs.digest:
        if counts is not None:
            of_shard = [sha256, inputs.results[index], inputs.round_of(index)]
            chain.append(hash_of([chain[-1], *of_shard]))
    return chain


def hash_of(content: Sequence[Any]) -> str:
    return hashlib.blake2b(msgspec.msgpack.encode(content), digest_size=16).hexdigest()


class Counted(msgspec.Struct, frozen=True, kw_only=True):
    """The first pass over some shards."""

    num_shards: int = 0
    link: str = ""
    """The chain's, of as many shards."""
    statistics: RunStatistics = msgspec.field(default_factory=RunStatistics)
    balances: dict[int, BalanceCounts] = {}
    """By round."""

    def holds(self, chain: Sequence[str]) -> bool:
        """Whether the first shards are these."""
        return self.num_shards < len(chain) and chain[self.num_shards] == self.link


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """The second pass at a shard: what it had decided before that, and what of its pairs after."""

    num_shards: int
    """Before this one."""
    dropped: dict[str, int]
    passed: Passed
    passed_after: Passed

    def origin(self, chain: Sequence[str], balances: Balances) -> str:
        """Hash of all pairs up to the end of this shard, and of what is decided about each."""
        return hash_of([chain[self.num_shards + 1], balances.dropped_of(self.passed_after)])


class Milestone(msgspec.Struct, frozen=True, kw_only=True):
    """A shard in which the last row of a part lies, and what was written before this shard.

    No pair of these was refused by the format.
    """

    step: Step
    pairs: PairStatistics
    splits: dict[Split, int]
    rounds: dict[int, int]


class Milestones(msgspec.Struct, frozen=True, kw_only=True):
    """Of one dataset."""

    counted: Counted | None = None
    made_by: str = ""
    """Hash of the settings of every row: others divide the same pairs into other splits."""
    of_origins: dict[str, msgspec.Raw] = {}
    """By the origin of the part, encoded."""

    def under(self, made_by: str) -> Milestones:
        """What of these holds for rows of these settings."""
        return self if self.made_by == made_by else Milestones(counted=self.counted)

    def of(self, origin: str) -> Milestone:
        return msgspec.msgpack.decode(self.of_origins[origin], type=Milestone)

    def tells(self, origin: str, chain: Sequence[str], balances: Balances) -> bool:
        """Whether a part of this origin would have it again."""
        if origin not in self.of_origins:
            return False
        step = self.of(origin).step
        return step.num_shards + 1 < len(chain) and step.origin(chain, balances) == origin


def read_milestones(path: Location) -> Milestones:
    """What is kept, which is nothing where it cannot be read."""
    return read_derived(path, MAGIC, Milestones) or Milestones()


def keep_milestones(path: Location, milestones: Milestones) -> None:
    """Put them in the place of those that are there, where that can be done."""
    try:
        keep_derived(path, MAGIC, milestones)
    except (ChangedError, OSError) as error:
        logger.debug("what was counted is not kept: %s", error)
