"""The benchmark of the kernels computes every row of its table."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton has no package for this platform")

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_kernels.py"


def test_dry_run_computes_every_row_and_kernels_match_their_references() -> None:
    command = [sys.executable, str(SCRIPT), "--dry-run", "--tokens", "128"]
    done = subprocess.run(command, cwd=SCRIPT.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    title, _, _, *rows = done.stdout.splitlines()
    assert title.startswith("dry run, ")
    assert len(rows) == 11
    for row in rows:
        *_, ratio, difference = row.split()
        assert re.fullmatch(r"\d+\.\d\d", ratio), row
        # the interpreter truncates bfloat16 where a GPU rounds: two ulps at the largest of these values
        assert 0 <= float(difference) <= 2 * 2.0**-7 * 16, row


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_names_the_dry_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert exit_.value.code == 2
    assert "no CUDA device: only --dry-run works on this machine" in capsys.readouterr().err
