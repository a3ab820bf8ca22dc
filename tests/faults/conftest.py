"""Shared runs, the number of cases (`QLORA_FAULTS=long` for the full counts), and the table at the end."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.faults.disks import Disk
from tests.faults.runs import Runs
from tests.support.pico import build_pico

LONG = os.environ.get("QLORA_FAULTS", "short") == "long"


@dataclass
class Table:
    """Faults and outcomes, printed at the end of the test run."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)

    def add(self, fault: str, good: int, of: int, meaning: str) -> None:
        """Add a row: `good` of `of` ended as `meaning` says."""
        self.rows.append((fault, f"{good} of {of}", meaning))


_table = Table()


@pytest.fixture(scope="session")
def table() -> Table:
    return _table


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    folder = tmp_path_factory.mktemp("faults")
    return Runs(folder, build_pico(folder / "base", num_hidden_layers=1))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small file system."""
    disk = Disk(tmp_path / "disk")
    if not disk.mount(8 << 20):
        pytest.skip("needs the right to mount a file system")
    yield disk
    disk.unmount()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _table.rows:
        return
    widths = [max(len(row[column]) for row in _table.rows) for column in (0, 1)]
    terminalreporter.section(f"faults ({'long' if LONG else 'short'} form, pico model in NF4 on the CPU)")
    for fault, count, meaning in _table.rows:
        terminalreporter.write_line(f"{fault:<{widths[0]}}  {count:>{widths[1]}}  {meaning}")


def number(short: int, long: int) -> int:
    """Return the number of cases."""
    return long if LONG else short
