"""`QLORA_ARCHITECTURES=long` runs every test on every family; a table of results is printed at the end."""

import os
from collections import defaultdict
from typing import Any

import pytest

LONG = os.environ.get("QLORA_ARCHITECTURES", "short") == "long"
COLUMNS = ("4 bits", "experts in 4 bits", "loss", "fused kernels", "packed", "resumed", "merged", "gguf")
Table = dict[str, dict[str, str]]

_table: Table = defaultdict(dict)


@pytest.fixture(scope="session")
def table() -> Table:
    """Results per model_type, filled by the tests."""
    return _table


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not _table:
        return
    terminalreporter.section(f"architectures ({'long' if LONG else 'short'} form, pico models on the CPU)")
    rows = [("", *COLUMNS), *((name, *(row.get(key, "-") for key in COLUMNS)) for name, row in sorted(_table.items()))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS) + 1)]
    for row in rows:
        terminalreporter.write_line("  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)))
