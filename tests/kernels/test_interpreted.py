"""The Triton kernels on this machine's CPU: `test_triton_*.py`, interpreted on a fake device in a process of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has no package for this platform")

FOLDER = Path(__file__).parent


@pytest.mark.parametrize(
    ("fake_cuda", "which", "least"), [("1", "not torch_compiles", 300), ("0", "torch_compiles", 1)], ids=["fake", "cpu"]
)
def test_every_kernel_computes_what_it_should(fake_cuda: str, which: str, least: int) -> None:
    files = sorted(str(file) for file in FOLDER.glob("test_triton_*.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *files, "-k", which, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1", "FAKE_CUDA": fake_cuda},  # torch.compile refuses the fake device
        cwd=FOLDER.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout[-1000:]
    assert int(passed[1]) > least, "all files have their cases"
    assert "skipped" not in done.stdout, "every case has run"
