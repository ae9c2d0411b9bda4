"""Which form a call takes: Triton's for tensors on a GPU, torch's for all others.

STREAM_KERNELS_FORM=triton, for rehearsals and tests, gives the Triton forms tensors on CPU as well;
Triton's interpreter then runs them, which TRITON_INTERPRET=1 has to start. Both are read here and
once, when the package is imported.
"""

import os

import torch


def _interpreted() -> bool:
    form = os.environ.get("STREAM_KERNELS_FORM", "")
    if form not in ("", "triton"):
        raise ValueError(f"STREAM_KERNELS_FORM is {form!r}; it can be 'triton' alone")
    if form and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("STREAM_KERNELS_FORM=triton needs TRITON_INTERPRET=1 beside it")
    return bool(form)


INTERPRETED = _interpreted()
"""Whether the Triton forms serve tensors on CPU too."""


def takes_triton(device: torch.device) -> bool:
    """Whether calls with tensors on `device` take the Triton forms."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")
