"""The NVIDIA GPUs that a process would see, counted without torch and without initialising CUDA."""

import os
import re
from pathlib import Path

DEVICES = Path("/dev")
DRIVER_FILES = Path("/proc/driver/nvidia/gpus")
_GPU = re.compile(r"nvidia\d+")


def visible_gpus() -> list[str]:
    """Return the values of CUDA_VISIBLE_DEVICES that show one GPU each; empty without a GPU or if all are hidden.

    A number that is negative ends the list, as for the driver.
    """
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    if setting is None:
        found = DEVICES.iterdir() if DEVICES.is_dir() else ()
        return [str(number) for number in range(sum(_is_usable_gpu(path) for path in found))]
    names: list[str] = []
    for name in map(str.strip, setting.split(",")):
        if not name or name.startswith("-") or name == "NoDevFiles":  # Slurm's for none
            break
        names.append(name)
    return names


def gpu_models() -> list[str]:
    """Return the names of the machine's kinds of GPU, from the driver's files; empty if it has none."""
    files = DRIVER_FILES.glob("*/information")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    return sorted({line.partition(":")[2].strip() for line in lines if line.startswith("Model:")})


def _is_usable_gpu(path: Path) -> bool:
    if not _GPU.fullmatch(path.name):
        return False
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:  # a job's control group shows all devices and opens its own
        return False
    return True
