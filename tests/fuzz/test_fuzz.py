"""Any bytes in a config, an override or a data file raise only our error class, in readable lines."""

import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, overrides, words_of

ROOT = Path(__file__).parents[2]
RUNS = {"yaml": 2000, "overrides": 2500, "jsonl": 10_000}
"""Coverage-guided inputs per target, about five seconds; `scripts/fuzz.py TARGET --seconds N` runs longer."""
SEEDS = {name: list(seeds()) for name, (_, seeds) in TARGETS.items()}
targets = pytest.mark.parametrize("name", TARGETS)


@st.composite
def damaged(draw: st.DrawFn, name: str) -> bytes:
    """Return a corpus file with parts cut out, doubled, or replaced by words and bytes."""
    content = draw(st.sampled_from(SEEDS[name]))
    pieces = st.sampled_from(words_of(name)).map(lambda word: word.encode("utf-8", "replace")) | st.binary(max_size=4)
    for _ in range(draw(st.integers(0, 5))):
        begin = draw(st.integers(0, len(content)))
        end = draw(st.integers(begin, min(len(content), begin + 30)))
        kept = content[begin:end] if draw(st.booleans()) else b""
        content = content[:begin] + kept + draw(pieces) + kept + content[end:]
    return content


@targets
def test_the_corpus_is_there_and_passes(name: str) -> None:
    target, _ = TARGETS[name]
    assert len(SEEDS[name]) > 5
    for seed in SEEDS[name]:
        target(seed)


@targets
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_only_our_errors_escape_from_damaged_files(name: str, data: st.DataObject) -> None:
    target, _ = TARGETS[name]
    target(data.draw(damaged(name)))


@targets
@pytest.mark.skipif(importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this interpreter")
def test_only_our_errors_escape_from_what_coverage_finds(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "scripts/fuzz.py", name, "--runs", str(RUNS[name]), "--findings", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"Done {RUNS[name]} runs" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_targets_see_an_error_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_arguments: object) -> Iterator[None]:
        raise KeyError("ours to fix")

    monkeypatch.setattr("qlora_train.config.reader.read_yaml", broken)
    with pytest.raises(KeyError):
        overrides(b"train.optim=sgd")
