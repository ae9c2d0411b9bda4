"""Where the Triton kernels run in these tests, and on which dtypes."""

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter multiplies the bits of bfloat16 numbers as if they were integers.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
# Of one number's rounding in the dtype, what an attention output of size 1 may be off by.
OUTPUT_ERROR = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
