"""Checks of the GPUs and of the libraries that compute on them."""

import logging
import os
import shutil
import sysconfig
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch

from qlora_train.doctor.machine_check import Check, pip
from qlora_train.utils.device import describe_cpu, describe_gpu
from qlora_train.utils.nvidia_driver import gpu_problem

NO_GPU = "not used without a GPU"


def devices() -> Iterator[Check]:
    """Check each visible GPU, or say why there is none."""
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            yield Check("GPU", "ok", describe_gpu(torch.device("cuda", index)))
    elif problem := gpu_problem():
        yield Check("GPU", "problem", problem.removeprefix("GPU: "))
    else:
        yield Check("GPU", "note", f"{describe_cpu()}: training works, and is practical for small models only")


def compute_dtype() -> Iterator[Check]:
    """Check whether matrix products run in bfloat16."""
    from qlora_train.models.hardware import automatic_compute_dtype

    dtype, reason = automatic_compute_dtype(_device())
    text = f"{str(dtype).removeprefix('torch.')} ({reason})"
    yield Check("compute dtype", "ok" if dtype == torch.bfloat16 else "note", text)


def packed_attention() -> Iterator[Check]:
    """Check torch's attention for packed and padding-free rows, forward and backward."""
    if (device := _device()).type == "cpu":
        yield Check("packed attention", "ok", f"sdpa in batches (torch's varlen kernel is {NO_GPU})")
        return
    from qlora_train.kernels.packed.varlen import varlen_problem

    if problem := varlen_problem(device):
        yield Check("packed attention", "note", f"sdpa in batches: torch's varlen kernel fails ({problem})")
    else:
        yield Check("packed attention", "ok", "torch's varlen kernel agrees with sdpa")


def triton_kernels() -> Iterator[Check]:
    """Check that Triton compiles and runs a kernel."""
    if (device := _device()).type == "cpu":
        yield Check("Triton", "ok", NO_GPU)
    elif find_spec("triton") is None:
        yield Check("Triton", "note", "not installed: torch computes instead, slower", f"run: {pip()} install triton")
    else:
        from qlora_train.kernels.ops.dispatch import triton_problem

        problem = triton_problem(device)
        if problem is None:
            yield Check("Triton", "ok", f"compiles and runs kernels (C compiler {c_compiler()})")
        else:
            yield Check("Triton", "note", f"off, torch computes instead, slower ({problem})", compiler_fix())


def c_compiler() -> str | None:
    """Return the C compiler that Triton calls: CC, gcc or clang."""
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")


def compiler_fix() -> str:
    """Return the command that installs what Triton lacks to compile, or an empty string."""
    missing = [] if c_compiler() else ["gcc"]
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        missing.append("python3-dev")
    return f"run: apt-get install {' '.join(missing)} (or set CC)" if missing else ""


def bitsandbytes_library() -> Iterator[Check]:
    """Check that the native library of bitsandbytes loads for this device."""
    logging.getLogger("bitsandbytes").setLevel(logging.CRITICAL)  # it logs a traceback
    import bitsandbytes
    from bitsandbytes import cextension

    version = bitsandbytes.__version__
    backend = "CPU" if _device().type == "cpu" else cextension.BNB_BACKEND
    if not isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        yield Check("bitsandbytes", "ok", f"{version}, {backend} library")
    elif backend == "CPU":
        yield Check("bitsandbytes", "note", f"{version}: its CPU library does not load; torch computes instead, slower")
    else:
        built = torch.version.cuda or torch.version.hip
        yield Check(
            "bitsandbytes", "problem", f"{version} has no {backend} library that loads for torch's {backend} {built}",
            f"run: {pip()} install --upgrade bitsandbytes (details: python -m bitsandbytes), or use an older CUDA's torch",
        )  # fmt: skip


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
