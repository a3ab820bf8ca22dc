"""Devices for tests of Triton kernels: a GPU, or a fake one with Triton's interpreter, in a separate process.

Triton chooses the interpreter at import, so `test_interpreted.py` starts a second pytest.
"""

import os
from typing import Any

import numpy as np
import pytest
import torch

from qlora_train.kernels.ops import dispatch
from tests.support.fake_cuda import IS_FAKE

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether this process interprets kernels, on tensors of the fake device or of the CPU."""

DEVICE = "cpu" if IS_INTERPRETED and not IS_FAKE else "cuda"
has_its_device = IS_INTERPRETED or (torch.cuda.is_available() and not IS_FAKE)
needs_its_device = [pytest.mark.gpu, pytest.mark.skipif(not has_its_device, reason="needs a CUDA device")]


CLOSE = {
    torch.float32: {"rtol": 1e-5, "atol": 2e-6},
    torch.bfloat16: {"rtol": 2.0**-7, "atol": 1e-6},
    torch.float16: {"rtol": 2.0**-10, "atol": 1e-6},
}
"""Tolerances against the reference: sums in another order may round differently by one ulp."""


def use_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run operations as kernels on this process's tensors."""
    monkeypatch.setattr(dispatch, "runs_triton", lambda x: True)


def round_like_a_gpu() -> None:
    """Make the interpreter round float32 to bfloat16 to nearest, ties to even, as compiled kernels do; it truncates."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast = InterpreterBuilder.cast_impl

    def cast_to_nearest(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return cast(self, source, to)
        rounded = torch.from_numpy(np.array(source.data, dtype=np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), to.scalar)

    InterpreterBuilder.cast_impl = cast_to_nearest
    for name in ("create_si_to_fp", "create_ui_to_fp", "create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast_to_nearest)


if IS_INTERPRETED:
    round_like_a_gpu()
