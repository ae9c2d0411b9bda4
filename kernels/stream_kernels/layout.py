"""HostLayout: the host's copy of where a decode step's rows and prefixes lie.

The device tensors of `prefix_attention` are the truth; this copy lets the CPU form plan its calls
without reading tensors back. Make one a step: all layers share the tensors derived from it.
"""

import dataclasses
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

# What one more attention call costs, in tokens of one slot: below that, slots of unequal length
# share a call and the shorter ones are masked.
_CALL_OVERHEAD_TOKENS = 128


class RowOrder:
    """A permutation of the rows; where they already lie so, nothing is copied."""

    def __init__(self, rows: list[int]) -> None:
        self._identity = rows == list(range(len(rows)))
        self._rows = torch.tensor(rows, dtype=torch.int64)
        self._places = torch.argsort(self._rows)

    def take(self, by_row: Tensor) -> Tensor:
        """[R, ...] in this order."""
        return by_row if self._identity else by_row[self._rows]

    def give_back(self, ordered: Tensor) -> Tensor:
        """[R, ...] in the order of the rows again."""
        return ordered if self._identity else ordered[self._places]


class SuffixRun(NamedTuple):
    """Neighbouring slots [first, last) that one attention call serves, reading `length` tokens.

    mask [last - first, 1, 1, length] is 0 or -inf; None where all slots hold `length` tokens.
    """

    first: int
    last: int
    length: int
    mask: Tensor | None


@dataclasses.dataclass
class HostLayout:
    """Plain lists that say the same as the int32 tensors given to `prefix_attention`.

    spans[g] = (start, length) of group g's prefix in tokens; groups[g] = its row indices, without
    padding (a group may be empty); slots[r] and suffix_lengths[r] = row r's slot and valid tokens.
    """

    spans: list[tuple[int, int]]
    groups: list[list[int]]
    slots: list[int]
    suffix_lengths: list[int]

    @classmethod
    def from_tensors(
        cls, prefix_spans: Tensor, group_rows: Tensor, row_slots: Tensor, suffix_lengths: Tensor
    ) -> "HostLayout":
        """Read the device tensors back (this waits for the device)."""
        return cls(
            spans=[(start, length) for start, length in prefix_spans.tolist()],
            groups=[[row for row in rows if row >= 0] for rows in group_rows.tolist()],
            slots=row_slots.tolist(),
            suffix_lengths=suffix_lengths.tolist(),
        )

    @cached_property
    def by_slot(self) -> RowOrder:
        """The rows in ascending order of their slots."""
        return RowOrder(sorted(range(len(self.slots)), key=self.slots.__getitem__))

    @cached_property
    def by_group(self) -> RowOrder:
        """The rows of group 0, then those of group 1, and so on."""
        return RowOrder([row for rows in self.groups for row in rows])

    @cached_property
    def suffix_runs(self) -> list[SuffixRun]:
        """The slots in use, cut into runs of neighbours so that little is read in vain."""
        runs: list[SuffixRun] = []
        first = 0
        lengths: list[int] = []  # of the run being gathered
        for slot, length in sorted(zip(self.slots, self.suffix_lengths, strict=True)):
            longest = max(lengths, default=0)
            joined = (len(lengths) + 1) * max(longest, length)
            apart = len(lengths) * longest + length + _CALL_OVERHEAD_TOKENS
            if lengths and slot == first + len(lengths) and joined <= apart:
                lengths.append(length)
                continue
            if lengths:
                runs.append(_suffix_run(first, lengths))
            first, lengths = slot, [length]
        if lengths:
            runs.append(_suffix_run(first, lengths))
        return runs


def _suffix_run(first: int, lengths: list[int]) -> SuffixRun:
    longest = max(lengths)
    mask = None
    if min(lengths) < longest:
        beyond = torch.arange(longest) >= torch.tensor(lengths)[:, None]
        mask = torch.zeros(beyond.shape).masked_fill_(beyond, -torch.inf)[:, None, None]
    return SuffixRun(first, first + len(lengths), longest, mask)
