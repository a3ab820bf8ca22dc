"""The commands of docs/index.md, in their order, on a pico model and a file of chats."""

import io
import re
import shlex
from pathlib import Path

import pytest

from qlora_train.cli.main import main
from qlora_train.runs import RunFolder, read_json
from tests.support.runs import write_rows
from tests.support.sentencepiece_pico import sentencepiece_pico

ROOT = Path(__file__).parents[2]
ELSEWHERE = ("doctor",)
"""Commands that have a test of their own, which takes long."""


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = [shlex.split(line)[1:] for block in blocks for line in block.splitlines() if line.startswith("qlora-train")]
    return [words for words in lines if words[0] not in ELSEWHERE]


def test_commands_of_the_tour_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("xllamacpp")
    base = sentencepiece_pico(tmp_path / "base", head_dim=32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("1 + 2\n"))
    write_rows(Path("chats.jsonl"), count=60)
    for written in commands():
        words = [str(base) if word == "Qwen/Qwen3-8B" else word for word in written]
        assert main(words) == 0, (words, capsys.readouterr().err)
    run = RunFolder(Path("runs/chats"))
    assert run.is_finished()
    assert run.has_merged()
    assert (run.path / "report.html").is_file()
    assert list(run.exports.glob("gguf-q4_k_m/*.gguf"))
    assert read_json(run.results_file)["evaluation"]
