"""PrefixBatch: the tensors of one call of `stream_kernels.prefix_attention`, for both its forms."""

from typing import NamedTuple

from torch import Tensor


class PrefixBatch(NamedTuple):
    """In the order in which kernels take them; legend as in `stream_kernels.reference`."""

    query: Tensor  # [R, Hq, D]
    prefix_key: Tensor  # [Hkv, T, D]
    prefix_value: Tensor
    prefix_spans: Tensor  # [G, 2]
    group_rows: Tensor  # [G, K]
    suffix_key: Tensor  # [S, Hkv, C, D]
    suffix_value: Tensor
    row_slots: Tensor  # [R]
    suffix_lengths: Tensor  # [R]
