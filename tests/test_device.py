"""The memory of a process between its steps."""

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
import torch
from contextlib import nullcontext
from qlora_train.device import keeping_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def pages():
    return int(open("/proc/self/statm").read().split()[1])

def step():
    return [torch.ones(5 << 20, dtype=torch.float32) for _ in range(8)]  # 160 MiB, 40,960 pages

for context in (nullcontext(), keeping_freed_memory(torch.device("cpu"))):
    with context:
        step()
        before = faults()
        for _ in range(4):
            step()
        print(faults() - before)
        inside = pages()
    print(inside - pages())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="counts pages as Linux does")
def test_steps_find_the_memory_of_the_steps_before_them_and_give_it_back_at_the_end() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    faults_without, _, faults, given_back = map(int, done.stdout.split())
    if faults_without < 4 * 1000:
        pytest.skip("this C library keeps freed memory by itself, or its pages are huge")
    assert faults < faults_without / 20
    assert given_back > 10_000
