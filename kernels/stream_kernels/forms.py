"""Which form a call takes: Triton's for tensors on a GPU, torch's or a compiled one for all others.

STREAM_KERNELS_FORM=triton, for rehearsals and tests, gives the Triton forms tensors on CPU as well;
Triton's interpreter then runs them, which TRITON_INTERPRET=1 has to start. The form `torch` leaves
the compiled one for CPU out. Both are read here and once, when the package is imported.
"""

import os

import torch


def _form() -> str:
    form = os.environ.get("STREAM_KERNELS_FORM", "")
    if form not in ("", "triton", "torch"):
        raise ValueError(f"STREAM_KERNELS_FORM is {form!r}; it can be 'triton' or 'torch'")
    if form == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("STREAM_KERNELS_FORM=triton needs TRITON_INTERPRET=1 beside it")
    return form


INTERPRETED = _form() == "triton"
"""Whether the Triton forms serve tensors on CPU too."""
TORCH_ONLY = _form() == "torch"
"""Whether tensors on CPU take torch's form even where a compiled one is at hand."""


def takes_triton(device: torch.device) -> bool:
    """Whether calls with tensors on `device` take the Triton forms."""
    return device.type == "cuda" or (INTERPRETED and device.type == "cpu")
