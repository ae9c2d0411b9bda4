"""Kernels for decoding many answers to one question: attention, sampling, log-probs.

The functions choose their form by the device of their inputs, on CPU by the processor too;
`stream_kernels.reference` has the same signatures in plain torch and is their contract. The package
knows no model and no engine.
"""

from stream_kernels.attention import attention_with_lse, merge_by_lse
from stream_kernels.layout import HostLayout
from stream_kernels.linear_logp import linear_logp
from stream_kernels.prefix_attention import prefix_attention
from stream_kernels.sample import raise_on_nan, sample
from stream_kernels.uniforms import uniforms

__all__ = [
    "HostLayout",
    "attention_with_lse",
    "linear_logp",
    "merge_by_lse",
    "prefix_attention",
    "raise_on_nan",
    "sample",
    "uniforms",
]
