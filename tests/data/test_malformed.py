"""Malformed data is one line that says what was found where, before a model is loaded: tests/data/malformed.

Each `NAME` there has `NAME.expected`, and `NAME.settings` where it takes more than the path to meet the problem.
"""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.cli.main import main

MALFORMED = Path(__file__).parents[1] / "files" / "malformed"
EXPECTED = sorted(MALFORMED.glob("*.expected"))
CONFIG = """\
model:
  model_name_or_path: {base}
data:
  train: none.jsonl
  max_length: 64
  cache_dir: {cache}
"""
Line = Callable[..., str]


@pytest.fixture(scope="module")
def config(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of every case: a base of which only the tokenizer is there, so that loading the model would fail."""
    folder = tmp_path_factory.mktemp("malformed")
    base = folder / "base"
    base.mkdir()
    for file in pico_llama.iterdir():
        if not file.name.endswith(".safetensors"):
            (base / file.name).write_bytes(file.read_bytes())
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(base=base, cache=folder / "cache"))
    return path


@pytest.fixture
def line(config: Path, capsys: pytest.CaptureFixture[str]) -> Line:
    """The one line on standard error with which `qlora-train data` refuses a path."""

    def refusal(name: str, *settings: str) -> str:
        status = main(["data", str(config), f"data.train={name}", *settings])
        captured = capsys.readouterr()
        assert status == 2, captured.out
        assert captured.out == "" or "data.max_dropped" in captured.err, "a report only of the rows that can be used"
        lines = captured.err.splitlines()
        assert not any("Traceback" in each for each in lines)
        return lines[-1] if all(is_log_of(each, name) for each in lines[:-1]) else captured.err

    return refusal


def is_log_of(text: str, name: str) -> bool:
    """Say whether a line is one that a data set which is well-formed so far is announced with."""
    return ": format " in text or ": tokenising " in text or text.startswith(f"data.train: folder {name}: reading ")


@pytest.mark.parametrize("expected", EXPECTED, ids=lambda path: path.stem)
def test_malformed_data_gives_exactly_its_one_line(expected: Path, line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(MALFORMED)
    settings = expected.with_suffix(".settings")
    arguments = settings.read_text().splitlines() if settings.exists() else []
    assert line(expected.stem, *arguments) == expected.read_text().rstrip("\n")


def test_every_malformed_file_has_its_line() -> None:
    files = {path.name for path in MALFORMED.iterdir() if path.suffix not in (".expected", ".settings")}
    assert files == {path.stem for path in EXPECTED}
    assert {path.stem for path in MALFORMED.glob("*.settings")} <= files
    assert len(files) >= 160
    assert len([name for name in files if name.startswith("pair_")]) >= 40


@pytest.mark.parametrize(("name", "number"), [("large.jsonl", 2), ("large.json", 2), ("large.csv", 3)])
def test_a_row_of_ten_megabytes_is_refused(tmp_path: Path, line: Line, name: str, number: int) -> None:
    large = "x" * 10_000_000
    content = {
        "large.jsonl": f'{{"text": "a"}}\n{{"text": "{large}"}}\n',
        "large.json": f'[{{"text": "a"}},\n{{"text": "{large}"}}]',
        "large.csv": f"text\na\n{large}\n",
    }
    (tmp_path / name).write_text(content[name])
    assert line(str(tmp_path / name)) == (
        f"{tmp_path / name}:{number}: found a row of more than 8 MiB; split it into several rows, or correct the line or "
        "quote that does not end"
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_broken_lines_are_counted_over_the_whole_file(tmp_path: Path, line: Line, suffix: str) -> None:
    lines = ['{"text": "' + "a" * 1000 + '"}'] * 4000  # several chunks of a megabyte
    broken = [7, 8, 1500, 2100, 2101, 3000, 4000]
    for number in broken:
        lines[number - 1] = lines[number - 1][:-1]
    content = "\n".join(lines).encode()
    file = tmp_path / f"a{suffix}"
    file.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert line(str(file)) == (
        f"{file}:7:1012: broken JSON: Expecting ',' delimiter; expected one JSON object per line (a list of objects is a "
        ".json file); 6 more broken lines: 8, 1500, 2100, 2101, 3000, ..."
    )


def test_json_that_is_nested_too_deeply_is_refused(tmp_path: Path, line: Line) -> None:
    (tmp_path / "deep.jsonl").write_text('{"text": ' + "[" * 200_000 + "]" * 200_000 + "}\n")
    assert line(str(tmp_path / "deep.jsonl")) == (
        f"{tmp_path / 'deep.jsonl'}:1: found JSON that is nested too deeply; expected one JSON object per line (a list of "
        "objects is a .json file)"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_that_may_not_be_read_is_refused(tmp_path: Path, line: Line) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "a.jsonl").chmod(0)
    assert line(str(tmp_path / "a.jsonl")) == f"{tmp_path / 'a.jsonl'}: cannot be read: Permission denied"


def test_an_empty_folder_and_a_pattern_without_a_match_are_refused(tmp_path: Path, line: Line) -> None:
    assert line(str(tmp_path)) == (
        f"data.train: folder {tmp_path} holds no data file: found no files; expected .jsonl, .json, .csv, .tsv, .txt, "
        ".ndjson (also .gz or .zst), .parquet, .arrow"
    )
    assert line(f"{tmp_path}/*.jsonl") == (
        f"data.train: the pattern {tmp_path}/*.jsonl matches no file; check the folder and the suffix"
    )


def test_malformed_data_ends_a_process_of_its_own_without_a_traceback(config: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "qlora_train.cli.main",
        "data",
        str(config),
        f"data.train={MALFORMED}/latin1.jsonl",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stdout) == (2, "")
    expected = (MALFORMED / "latin1.jsonl.expected").read_text().rstrip("\n")
    assert done.stderr.splitlines()[-1] == f"{MALFORMED}/{expected}"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("row", ['{"messages": [1, 2, ]}', '{"messages": [],}'])
def test_a_trailing_comma_is_named(row: str, line: Line, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    assert "comma before" in line(str(tmp_path / "rows.jsonl"))
