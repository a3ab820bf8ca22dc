"""Memory beside tensors on a CPU: cached kernels stay few, and freed tensors leave the process."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qlora_train.planning.plan_device import has_avx512
from qlora_train.utils.cpu_memory import KERNEL_CACHE_VARIABLES, MAX_KERNELS, limit_kernel_caches, return_freed_memory

NUM_SHAPES = 400
GROWTH = f"""
import ctypes, sys, torch
from qlora_train.utils.cpu_memory import limit_kernel_caches

class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena o s h mapped u f used free keepcost".split()]

def used():
    info = ctypes.CDLL(None).mallinfo2
    info.restype = Heap
    heap = info()
    return heap.used + heap.mapped

if sys.argv[1] == "limited":
    limit_kernel_caches()
weight, before = torch.ones(512, 64, dtype=torch.bfloat16), used()
for rows in range(33, 33 + {NUM_SHAPES}):
    torch.ones(rows, 512, dtype=torch.bfloat16) @ weight
print(used() - before)
"""
"""Prints by how much the used part of the heap grows, which trimming and fragmentation do not change."""


def heap_growth(limited: str) -> int:
    environment = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHE_VARIABLES}
    command = [sys.executable, "-c", GROWTH, limited]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.skipif(not has_avx512(), reason="16-bit products have no kernels of their own")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the heap is not glibc's")
def test_kernels_of_new_lengths_replace_older_ones() -> None:
    unlimited, limited = heap_growth("unlimited"), heap_growth("limited")
    assert unlimited / NUM_SHAPES == pytest.approx(550_000, rel=0.1)
    assert limited / MAX_KERNELS == pytest.approx(550_000, rel=0.1)


def test_a_users_limit_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = KERNEL_CACHE_VARIABLES
    monkeypatch.setenv(first, "7")
    monkeypatch.delenv(second, raising=False)
    limit_kernel_caches()
    assert (os.environ[first], os.environ.pop(second)) == ("7", str(MAX_KERNELS))


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the heap is not glibc's")
def test_freed_tensors_between_others_leave_the_process() -> None:
    mapped = torch.empty(30 << 20, dtype=torch.uint8)
    del mapped  # from now on tensors of up to 30 MB are in the heap
    tensors = [(torch.ones(1 << 20, dtype=torch.uint8), torch.ones(100)) for _ in range(200)]
    between = [small for _, small in tensors]
    before = resident_bytes()
    del tensors
    return_freed_memory()
    assert before - resident_bytes() > 150 << 20
    assert len(between) == 200


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
