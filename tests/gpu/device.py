"""Where tests of the GPU path run: on a GPU, or small and in Triton's interpreter, or not at all.

On a machine without a GPU they are skipped, unless STREAM_KERNELS_FORM=triton and
TRITON_INTERPRET=1 ask for a rehearsal of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from stream_kernels import forms

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
needs_device = pytest.mark.skipif(
    not (ON_GPU or forms.INTERPRETED), reason="needs a GPU, or Triton's interpreter"
)


@contextmanager
def torch_forms() -> Iterator[None]:
    """Let engines on CPU be what they are without a rehearsal."""
    with mock.patch.object(forms, "INTERPRETED", False):
        yield
