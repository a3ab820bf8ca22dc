"""Where the operations run: as Triton kernels on a GPU, as plain torch elsewhere. Every operation asks here, once."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels read and write; all of them compute in float32."""


class Operation(NamedTuple):
    """The two passes of an operation, in plain torch or as kernels, with the same arguments."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def runs_triton(x: Tensor) -> bool:
    """Say whether operations on x run as Triton kernels."""
    return x.is_cuda and HAS_TRITON and x.dtype in DTYPES
