"""The device that a plan is for: the GPU or CPU of this machine, or a GPU of a given size. No torch."""

import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from qlora_train.utils.constants import UNTOUCHED_SHARE
from qlora_train.utils.errors import ConfigError
from qlora_train.utils.host_memory import available_bytes
from qlora_train.utils.num_cores import num_cores
from qlora_train.utils.visible_gpus import visible_gpus
from qlora_train.utils.visible_text import shortened

UNITS = {"GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20, "TB": 10**12, "TIB": 2**40}
MIN_SIZE, MAX_SIZE = 10**6, 10**15
MAX_QUOTED = 40
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")
CPU_FILE = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class PlanDevice:
    """A device.

    Attributes:
        name: as earlier runs on this machine recorded it.
        is_this_machine: it is the device of this process, not one that --memory describes.
        compute_bytes: of a number in the dtype that `bnb_4bit_compute_dtype: auto` chooses.
    """

    name: str
    on_gpu: bool
    memory_bytes: int
    is_this_machine: bool = True
    compute_bytes: int = 2

    @property
    def kind(self) -> str:
        """Type of the device in torch."""
        return "cuda" if self.on_gpu else "cpu"

    @property
    def usable_bytes(self) -> float:
        """Memory that a run may use."""
        return self.memory_bytes * (1 - UNTOUCHED_SHARE) if self.on_gpu else self.memory_bytes


def plan_device(memory: str | None) -> PlanDevice:
    """Return the device to plan for.

    Args:
        memory: of a GPU, such as 24GiB; None: the device of this machine.

    Raises:
        ConfigError: not a size.
    """
    if memory is not None:
        return PlanDevice(f"a GPU of {memory.strip()}", True, parse_size(memory, "--memory"), is_this_machine=False)
    return _nvidia_gpu() or PlanDevice(cpu_name(), False, available_bytes(), compute_bytes=2 if has_avx512() else 4)


def parse_size(text: str, where: str) -> int:
    """Return the bytes of a size such as 24GiB or 80 GB.

    Raises:
        ConfigError: not a size, or none that a device has.
    """
    match = _SIZE.fullmatch(text)
    unit = match[2].upper() if match else ""
    size = float(match[1]) * UNITS.get(unit, 0) if match else 0.0
    if not MIN_SIZE <= size <= MAX_SIZE:
        raise ConfigError(
            f"{where}: {shortened(text, MAX_QUOTED)!r} is not a size of memory; allowed: a number with MB, MiB, GB, GiB, "
            "TB or TiB, from 1 MB to 1000 TB; write 24GiB for a card that is sold with 24 GB"
        )
    return int(size)


def _nvidia_gpu() -> PlanDevice | None:
    """Return the first visible GPU, as nvidia-smi describes it; None without one."""
    visible = visible_gpus()
    if not visible:
        return None
    command = ["nvidia-smi", f"--id={visible[0]}", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        name, mebibytes = answer.splitlines()[0].rsplit(",", 1)
        return PlanDevice(name.strip(), True, int(mebibytes) * 2**20)
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def cpu_name() -> str:
    """Return the CPU's model and its number of cores."""
    names = re.findall(r"^model name\s*:\s*(.+)$", _cpu_file(), re.MULTILINE)
    cores = num_cores()
    return f"{names[0].strip() if names else platform.machine()}, {cores} core{'s' if cores > 1 else ''}"


def has_avx512() -> bool:
    """Return whether torch's kernels for AVX512 run, so that bfloat16 is the automatic compute dtype."""
    flags = set(_cpu_file().partition("flags")[2].partition("\n")[0].split())
    return {"avx512f", "avx512dq", "avx512bw", "avx512vl", "fma"} <= flags


def _cpu_file() -> str:
    return CPU_FILE.read_text(encoding="utf-8", errors="replace") if CPU_FILE.is_file() else ""
