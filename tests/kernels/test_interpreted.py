"""The Triton kernels on this machine's CPU: the cases of `test_triton_*.py`, interpreted in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

FOLDER = Path(__file__).parent
FILES = sorted(FOLDER.glob("test_triton_*.py"))
assert FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_kernels_compute_what_they_should(file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(file), "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\b[1-9]\d* passed", done.stdout), done.stdout[-1000:]
    assert "skipped" not in done.stdout, "every case has run"
