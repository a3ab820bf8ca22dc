"""The benchmark of the kernels computes every row of its table."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernels.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False)


def test_a_dry_run_computes_every_row_and_finds_both_sides_equal() -> None:
    done = run("--dry-run", "--tokens", "128")
    assert done.returncode == 0, done.stderr
    title, _, _, *rows = done.stdout.splitlines()
    assert title.startswith("dry run, ")
    assert len(rows) == 11
    for row in rows:
        *_, ratio, difference = row.split()
        assert re.fullmatch(r"\d+\.\d\d", ratio), row
        # the interpreter cuts bfloat16 off where a GPU rounds: two of its steps at the largest of these numbers
        assert 0 <= float(difference) <= 2 * 2.0**-7 * 16, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_what_works() -> None:
    done = run()
    assert done.returncode == 2
    assert "no CUDA device: only --dry-run works on this machine" in done.stderr
