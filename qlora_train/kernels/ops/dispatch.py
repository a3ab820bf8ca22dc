"""Where the operations run: as Triton kernels on a GPU, as plain torch elsewhere. Every operation asks here, once."""

import logging
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels read and write; all of them compute in float32."""

logger = logging.getLogger(__name__)


class Operation(NamedTuple):
    """The two passes of an operation, in plain torch or as kernels, with the same arguments."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def operation(x: Tensor, plain: Operation, name: str) -> Operation:
    """Return the passes of an operation where x is: the plain ones, or those of the kernels' file of this name."""
    if not runs_triton(x):
        return plain
    kernels = import_module(f"qlora_train.kernels.triton.{name}")
    return Operation(kernels.forward, kernels.backward)


def runs_triton(x: Tensor) -> bool:
    """Say whether operations on x, floating point, run as Triton kernels."""
    return x.dtype in DTYPES and has_kernels(x)


def has_kernels(x: Tensor) -> bool:
    """Say whether Triton kernels run where x is."""
    return x.is_cuda and HAS_TRITON and works_on(x.device)


@cache
def works_on(device: torch.device) -> bool:
    """Try a kernel on a device, once: Triton needs a C compiler, and a GPU that it compiles for; say so where it fails."""
    from qlora_train.kernels.ops.rms_norm import Variant

    ones = torch.ones(2, 64, device=device)
    try:
        from qlora_train.kernels.ops import rms_norm_triton as kernels

        found, _ = kernels.forward(ones, ones[0], 0.0, Variant(0.0, rounds_first=False))
        if torch.allclose(found, ones):
            return True
        problem = "a kernel computes wrong numbers"
    except torch.OutOfMemoryError:  # says nothing about the kernels
        raise
    except Exception as error:  # of Triton, of the compilers it calls, or of the driver
        problem = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    logger.warning("no Triton kernels on %s, bitsandbytes and plain torch compute instead: %s", device, problem)
    return False
