"""Where operations run: as Triton kernels on a GPU, in torch elsewhere."""

import logging
import math
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
    """The two passes of an operation; the torch reference and the Triton kernels have the same arguments."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


def operation(x: Tensor, reference: Operation, name: str) -> Operation:
    """Return the passes of an operation on the device of x: the reference, or those of `ops.<name>_triton`."""
    if not runs_triton(x):
        return reference
    kernels = import_module(f"{__package__}.{name}_triton")
    return Operation(kernels.forward, kernels.backward)


def runs_triton(x: Tensor) -> bool:
    """Return whether operations on x, floating point, run as Triton kernels."""
    return x.dtype in DTYPES and has_kernels(x)


def has_kernels(x: Tensor) -> bool:
    """Return whether Triton kernels run on the device of x."""
    return x.is_cuda and HAS_TRITON and works_on(x.device)


@cache
def works_on(device: torch.device) -> bool:
    """Run one kernel on a device and warn if it fails: Triton needs a C compiler, and a GPU that it compiles for."""
    problem = triton_problem(device)
    if problem is not None:
        logger.warning("Triton kernels: off on %s, bitsandbytes and torch compute instead (%s)", device, problem)
    return problem is None


def triton_problem(device: torch.device) -> str | None:
    """Run one kernel on a GPU and return why it fails, or None."""
    try:
        from qlora_train.kernels.ops import cross_entropy_triton

        losses = cross_entropy_triton.losses_and_gradient_(
            torch.zeros(2, 64, device=device), torch.zeros(2, dtype=torch.long, device=device)
        )
    except torch.OutOfMemoryError:  # no evidence against the kernels
        raise
    except Exception as error:  # of Triton, of the compilers it calls, or of the driver
        return f"{type(error).__name__}: {error}".strip().splitlines()[0]
    is_right = torch.allclose(losses, torch.full_like(losses, math.log(64)))
    return None if is_right else "a kernel computes wrong numbers"
