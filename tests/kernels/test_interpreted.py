"""`test_triton_*.py` by Triton's interpreter, on a fake CUDA device in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

FOLDER = Path(__file__).parent


def test_triton_kernels_match_their_references() -> None:
    files = sorted(str(file) for file in FOLDER.glob("test_triton_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "FAKE_CUDA": "1"},
        cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) > 200, "all files have their cases"
    assert "skipped" not in done.stdout, "every case has run"
