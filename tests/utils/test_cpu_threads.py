"""OpenMP's wait policy follows the CPU load, and libgomp applies it."""

import os
import subprocess
import sys
import time

import pytest

from qlora_train.utils import cpu_threads

START = """
import logging, sys
logging.basicConfig(level=logging.DEBUG, format="%(message)s", stream=sys.stdout)
from qlora_train.utils import cpu_threads
cpu_threads.busy_share = lambda _seconds: {busy}
cpu_threads.choose_wait_policy()
import torch
"""
SLEEPS, SPINS = "GOMP_SPINCOUNT = '0'", f"GOMP_SPINCOUNT = '{cpu_threads.SPIN_COUNT}'"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's")
@pytest.mark.parametrize(
    ("busy", "chosen", "logged", "policy"),
    [
        ("0.05", {}, "spin briefly before they sleep (other programs use 5% of the CPUs)", SPINS),
        ("0.5", {}, "sleep while they wait (other programs use 50% of the CPUs)", SLEEPS),
        ("None", {}, "sleep while they wait (CPU load unknown)", SLEEPS),
        ("0.0", {"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive (environment)", SLEEPS),
    ],
)
def test_libgomp_follows_the_wait_policy(busy: str, chosen: dict[str, str], logged: str, policy: str) -> None:
    """`OMP_DISPLAY_ENV` makes libgomp print what it read when torch loaded it."""
    inherited = {name: value for name, value in os.environ.items() if name not in cpu_threads._VARIABLES}
    done = subprocess.run(
        [sys.executable, "-c", START.format(busy=busy)],
        env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"cpu threads: {logged}" in done.stdout
    assert policy in done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")
def test_busy_share_counts_other_programs() -> None:
    """One endless loop per CPU leaves almost nothing idle."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in os.sched_getaffinity(0)]
    try:
        time.sleep(0.5)
        busy = cpu_threads.busy_share(0.5)
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()
    assert busy is not None
    assert busy > 0.8
