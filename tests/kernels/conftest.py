"""The Triton kernels are tested where they can run: on a GPU, or in Triton's interpreter."""

import os

import torch

collect_ignore = []
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore.append("triton_forms")  # test_interpreter.py runs them
