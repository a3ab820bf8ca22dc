"""The Triton kernels on this machine's CPU: the cases of `test_triton_*.py`, interpreted in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

FOLDER = Path(__file__).parent


def test_every_kernel_computes_what_it_should() -> None:
    files = sorted(str(file) for file in FOLDER.glob("test_triton_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) > 300, "all files have their cases"
    assert "skipped" not in done.stdout, "every case has run"
