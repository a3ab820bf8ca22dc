"""The peak of memory that this process takes between two moments."""

import re
from pathlib import Path

import psutil
import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"
"""Written to clear_refs: the peak of resident memory becomes what is resident now (proc(5))."""
MAX_CONTEXT_BYTES = 2 * 10**9
"""More beside torch's allocator is another process's."""

_gpu_peaks: dict[int, int] = {}
"""Peak of each GPU before its statistics were last reset."""


def reset_gpu_peak(device: torch.device) -> None:
    """Reset torch's peak of a GPU, which meters remember."""
    index = device.index or 0
    _gpu_peaks[index] = max(_gpu_peaks.get(index, 0), torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)


def gpu_peak_bytes(device: torch.device) -> int:
    """Return the peak of a GPU so far: this process's allocations, and the CUDA context, which plans count too."""
    allocated = torch.cuda.max_memory_allocated(device)
    return max(allocated, _gpu_peaks.get(device.index or 0, 0)) + _context_bytes(device)


class MemoryMeter:
    """Measures from its creation: growth of resident memory on a CPU, allocations and the CUDA context on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            reset_gpu_peak(device)
            _gpu_peaks[device.index or 0] = 0
            return
        self._can_reset = _reset_resident_peak()
        self._start_bytes = psutil.Process().memory_info().rss

    def peak_bytes(self) -> int:
        """Return the peak so far; on a CPU whose kernel cannot reset it, at most that much."""
        if self._device.type == "cuda":
            return gpu_peak_bytes(self._device)
        return max(0, _resident_peak() - self._start_bytes)


def _reset_resident_peak() -> bool:
    try:
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")
    except OSError:  # not on Linux, or a sandbox
        return False
    return True


def _resident_peak() -> int:
    text = STATUS.read_text(encoding="ascii", errors="replace") if STATUS.is_file() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE):
        return int(found[1]) * 1024
    return int(psutil.Process().memory_info().rss)  # not on Linux, or a sandbox


def _context_bytes(device: torch.device) -> int:
    free, total = torch.cuda.mem_get_info(device)
    beside = total - free - torch.cuda.memory_reserved(device)
    return beside if 0 < beside <= MAX_CONTEXT_BYTES else 0
