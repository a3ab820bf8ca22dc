"""Where the operations run: as Triton kernels on a GPU, as plain torch elsewhere. Every operation asks here, once."""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels read and write; all of them compute in float32."""


def runs_triton(x: Tensor) -> bool:
    """Say whether operations on x run as Triton kernels."""
    return x.is_cuda and HAS_TRITON and x.dtype in DTYPES
