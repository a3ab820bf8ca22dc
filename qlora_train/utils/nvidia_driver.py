"""The NVIDIA driver, and why torch cannot use its GPU; without nvidia-smi and NVML, which containers may lack."""

import ctypes
import os
import re
from pathlib import Path

import torch

VERSION_FILE = Path("/proc/driver/nvidia/version")
WSL_DEVICE = Path("/dev/dxg")
LIBRARY = "libcuda.so.1"
HIDDEN = {"", "-1", "NoDevFiles"}
"""Values of CUDA_VISIBLE_DEVICES that hide all GPUs; the last is Slurm's."""
FIRST_DRIVERS = {12: 525, 13: 580}
"""Minimum driver by major version of CUDA (CUDA Compatibility, NVIDIA)."""
_SUCCESS, _NO_DEVICE = 0, 100  # of CUresult
ON_CPU = "or set CUDA_VISIBLE_DEVICES= to train on the CPU"
GET_TORCH = "https://pytorch.org/get-started/locally"


def driver_version() -> str | None:
    """Return the version of the loaded driver, such as 580.65.06; None without a driver and on WSL."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", VERSION_FILE.read_text()) if VERSION_FILE.is_file() else None
    return found and found[0]


def gpu_problem() -> str | None:
    """Return why torch cannot use this machine's GPU and what to do; None without a GPU or if it is hidden."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible in HIDDEN or not (VERSION_FILE.exists() or WSL_DEVICE.exists()):
        return None
    driver = f"the NVIDIA driver {driver_version() or ''}".rstrip()
    try:
        library = ctypes.CDLL(LIBRARY)
        status = library.cuInit(0)
    except OSError:  # a container started without GPUs
        status = _NO_DEVICE
    if status == _NO_DEVICE:
        if driver_version() is None or torch.version.cuda is None:
            return None
        return (
            f"GPU: {driver} is loaded, and this process sees no GPU; start the container with --gpus all, request a GPU "
            f"from the job scheduler, correct CUDA_VISIBLE_DEVICES ({visible or 'not set'}), {ON_CPU}"
        )
    if status != _SUCCESS:
        return f"GPU: {driver} fails ({_name(library, status)}); see nvidia-smi, reboot after a driver update, {ON_CPU}"
    return f"GPU: {_torch_problem(driver, library)}, {ON_CPU}"


def _name(library: ctypes.CDLL, status: int) -> str:
    name = ctypes.c_char_p()
    library.cuGetErrorName(status, ctypes.byref(name))
    return (name.value or b"").decode() or f"CUresult {status}"


def _torch_problem(driver: str, library: ctypes.CDLL) -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA and {driver} has a GPU; install a CUDA build ({GET_TORCH})"
    version = ctypes.c_int()
    library.cuDriverGetVersion(ctypes.byref(version))
    has, needs = (version.value // 1000, version.value % 1000 // 10), int(torch.version.cuda.partition(".")[0])
    if has[0] >= needs:
        return f"torch {torch.__version__} does not find the GPU of {driver}; see python -m torch.utils.collect_env"
    return (
        f"{driver} has CUDA {has[0]}.{has[1]} and torch {torch.__version__} needs CUDA {torch.version.cuda}; install "
        f"driver {FIRST_DRIVERS.get(needs, f'for CUDA {needs}')} or newer, or torch for CUDA {has[0]} ({GET_TORCH})"
    )
