"""`qlora-train` alone, `--help`, `--version` and shell completion."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlora_train.cli.completion import complete_setting, insert_train
from qlora_train.cli.guide import STACK
from qlora_train.cli.main import COMMANDS, main
from qlora_train.config import RunConfig

ROOT = Path(__file__).parents[2]
Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.usefixtures("preserve_library_settings")


def completed(folder: Path, *words: str, shell: str = "bash") -> list[str]:
    """Return what a shell is offered for the last word."""
    line = " ".join(["qlora-train", *words])
    environment = {
        "_QLORA_TRAIN_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "COMP_CWORD": str(len(words)),
        "_TYPER_COMPLETE_ARGS": line, "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("COMP_")}
    done = subprocess.run(
        [sys.executable, "-m", "qlora_train.cli.main"], env={**inherited, **environment}, cwd=folder,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.split("\n")[:-1]


def test_command_alone_prints_a_short_guide_to_commands_that_exist(capsys: Capture) -> None:
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 15
    assert max(map(len, lines)) <= 100
    named = [line.split()[1] for line in lines if line.startswith("  qlora-train")]
    assert [name for name in named if name not in COMMANDS] == ["CONFIG"]
    assert {"doctor", "new", "plan", "data", "chat"} <= set(named)


def test_help_groups_commands_by_when_they_are_needed(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    groups = re.split(r"╭─ (.*?) ─+╮", text)[1:]
    found = {
        title: re.findall(r"^│ (\w+) ", body, re.MULTILINE)
        for title, body in zip(groups[::2], groups[1::2], strict=True)
        if title != "Options"
    }
    assert list(found) == ["Before a run", "A run", "After a run"]
    assert found == {title: [name for name, row in COMMANDS.items() if row.group == title] for title in found}
    assert "\x1b" not in text, "no colours in a pipe"


def test_help_of_a_command_that_logs_has_the_options_of_its_log(capsys: Capture) -> None:
    for name, row in COMMANDS.items():
        assert main([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert all((option in text) == row.logs for option in ("--quiet", "--verbose", "--log-format")), name


@pytest.mark.parametrize("words", [[], *([name] for name in COMMANDS)], ids=" ".join)
def test_help_shows_the_type_of_values_and_none_behind_flags(words: list[str], capsys: Capture) -> None:
    assert main([*words, "--help"]) == 0
    text = capsys.readouterr().out
    assert "bool" not in text
    assert "--help" in text
    if words == ["eval"]:
        assert re.search(r"--shots +<int", text), "options with a value keep its type"


def test_version_names_the_stack_without_importing_it(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    lines = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["qlora-train"] == importlib.metadata.version("qlora-train")
    assert {name: lines[name] for name in STACK if name != "triton"} == {
        name: importlib.metadata.version(name) for name in STACK if name != "triton"
    }
    assert re.fullmatch(r"\d+\.\d+.*|none \(torch for CPUs\)", lines["CUDA"])


def test_first_word_is_completed_to_commands(tmp_path: Path) -> None:
    assert completed(tmp_path, "ch") == [name for name in COMMANDS if name.startswith("ch")]


def test_config_files_and_settings_are_completed_with_and_without_train(tmp_path: Path) -> None:
    for name in ("a.yaml", "a.txt", "folder/b.yml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "also").mkdir()
    assert completed(tmp_path, "check", "a") == ["a.yaml", "also/"]
    assert completed(tmp_path, "check", "folder/") == ["folder/b.yml"]
    for words in (["a.yaml"], ["train", "a.yaml"], ["data", "a.yaml", "lora.r=8"]):
        assert completed(tmp_path, *words, "train.learning") == ["train.learning_rate="]
    [line] = completed(tmp_path, "a.yaml", "run.se", shell="zsh")
    assert '"run.seed="' in line
    assert completed(tmp_path, "chat", "al") == ["also/"]


def test_every_setting_is_offered_with_its_documentation() -> None:
    offered = dict(complete_setting(""))
    fields = {
        f"{section}.{key}=" for section, field in RunConfig.model_fields.items()
        for key in field.annotation.model_fields  # type: ignore[union-attr]
    }  # fmt: skip
    assert offered.keys() == fields
    assert all(offered.values())


def test_a_config_is_completed_as_an_argument_of_train() -> None:
    environment = {"COMP_WORDS": "qlora-train a.yaml lor", "COMP_CWORD": "2"}
    insert_train(COMMANDS, environment)
    assert environment == {"COMP_WORDS": "qlora-train train a.yaml lor", "COMP_CWORD": "3"}
    for words, index in (("qlora-train a.ya", "1"), ("qlora-train check a.yaml", "2"), ("qlora-train --he", "1")):
        environment = {"COMP_WORDS": words, "COMP_CWORD": index}
        insert_train(COMMANDS, environment)
        assert environment == {"COMP_WORDS": words, "COMP_CWORD": index}
