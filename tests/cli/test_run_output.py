"""What a run prints: few short lines without control characters; everything is in run.log."""

import json
import logging
import os
import re
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.cli import ray_command
from qlora_train.cli.main import main
from qlora_train.config.writer import to_yaml
from qlora_train.runs import RunFolder
from qlora_train.utils.file_log import PACKAGE
from tests.support.runs import make_config

ROOT = Path(__file__).parents[2]
MAX_LINES, MAX_CHARACTERS = 15, 120
STEPS = 4
Command = Callable[..., subprocess.CompletedProcess[str]]


def command(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `qlora-train` with its output in pipes."""
    return subprocess.run(
        [sys.executable, "-m", "qlora_train.cli.main", *map(str, words)], cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True,
    )  # fmt: skip


class PipedRun:
    """A run that trains, checks its adapter and merges, and what it printed."""

    def __init__(self, folder: Path, base: Path) -> None:
        settings = [f"train.max_steps={STEPS}", "train.eval_steps=2", "export.merge=true", "export.max_loss_increase=1"]
        self.config = folder / "whole.yaml"
        self.config.write_text(
            to_yaml(make_config(folder, base, *settings, "export.max_divergence=5")), encoding="utf-8"
        )
        self.run = RunFolder(folder / "run")
        self.done = command(self.config)
        self.lines = self.done.stderr.splitlines()
        self.log = self.run.log_file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def piped(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> PipedRun:
    return PipedRun(tmp_path_factory.mktemp("p"), pico_llama)


def control_characters(text: str) -> set[str]:
    return {character for character in text if unicodedata.category(character) in ("Cc", "Cf")} - {"\n"}


def test_at_most_15_lines_come_before_step_1(piped: PipedRun) -> None:
    assert piped.done.returncode == 0, piped.done.stderr
    first_step = next(number for number, line in enumerate(piped.lines) if line.startswith(f"step 1/{STEPS}"))
    assert 5 < first_step <= MAX_LINES, piped.done.stderr


def test_a_log_step_is_one_line_and_an_evaluation_one_more(piped: PipedRun) -> None:
    steps = [line.split()[1] + " " + line.split()[2] for line in piped.lines if line.startswith("step ")]
    assert steps == ["1/4 loss", "2/4 loss", "2/4 eval_loss", "3/4 loss", "4/4 loss", "4/4 eval_loss"]


def test_what_comes_after_the_last_step_is_short(piped: PipedRun) -> None:
    last_step = max(number for number, line in enumerate(piped.lines) if line.startswith("step "))
    rest = piped.lines[last_step + 1 :]
    assert len(rest) <= 8, rest
    assert any(line.startswith("adapter check: passed") for line in rest)
    assert any(line.startswith("merged: ") for line in rest)
    assert piped.done.stdout == f"finished: {piped.run.path}\n"


def test_piped_lines_are_short_and_without_control_characters(piped: PipedRun) -> None:
    assert max(map(len, piped.lines)) <= MAX_CHARACTERS
    assert control_characters(piped.done.stdout + piped.done.stderr) == set()


def test_run_log_has_every_line_and_what_is_not_printed(piped: PipedRun) -> None:
    assert all(line in piped.log for line in piped.lines)
    for detail in ("compute dtype: ", "quantization: ", "data.train: tokens per row: ", "fused kernels: 14 adapted"):
        assert f"DEBUG   {detail}" in piped.log
        assert detail not in piped.done.stderr
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ +\S", line) for line in piped.log.splitlines())
    assert control_characters(piped.log) == set()


def test_no_tracker_is_imported_or_mentioned(piped: PipedRun) -> None:
    assert not re.search("wandb|mlflow|trackio|tensorboard", piped.done.stderr + piped.done.stdout, re.IGNORECASE)


def test_quiet_prints_warnings_and_the_result_only(piped: PipedRun, tmp_path: Path) -> None:
    done = command(piped.config, f"run.output_dir={tmp_path / 'run'}", "export.merge=false", "train.optim=paged_adamw_8bit",
                   "--quiet")  # fmt: skip
    assert done.returncode == 0
    assert done.stdout == f"finished: {tmp_path / 'run'}\n"
    assert done.stderr.splitlines() == ["optimizer: paged_adamw_8bit runs without paging on a CPU"]
    log = RunFolder(tmp_path / "run").log_file.read_text(encoding="utf-8")
    assert "step 1/4  loss " in log, "the log file does not depend on what is printed"


def test_json_lines_have_stage_level_and_metrics(piped: PipedRun, tmp_path: Path) -> None:
    done = command(
        piped.config, f"run.output_dir={tmp_path / 'run'}", "export.merge=false", "--log-format", "json", "-v"
    )
    assert done.returncode == 0
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert all(line.keys() >= {"time", "level", "stage", "message"} for line in lines)
    assert {line["level"] for line in lines} == {"info", "debug"}
    stages = list(dict.fromkeys(line["stage"] for line in lines if line["stage"]))
    assert stages == ["data", "base", "adapter", "parity check", "memory", "training", "adapter check"]
    logged = [line for line in lines if "loss" in line]
    metrics = RunFolder(tmp_path / "run").metrics_file.read_text(encoding="utf-8").splitlines()
    assert [line["step"] for line in logged] == [1, 2, 3, 4]
    assert all(line["num_steps"] == STEPS for line in logged)
    recorded = [json.loads(line) for line in metrics if '"loss"' in line]
    for name in ("loss", "tokens_per_second", "mfu", "peak_memory_bytes"):
        assert [line[name] for line in logged] == [line[name] for line in recorded], name
    assert all(line["tokens_per_second"] > 0 and 0 < line["mfu"] < 1 for line in logged)


@pytest.mark.parametrize("flags", [[], ["--quiet"], ["--verbose"], ["--verbose", "--log-format", "json"]], ids=str)
def test_processes_on_a_cluster_log_as_the_command_does(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(PACKAGE), "handlers", [])
    commands = []
    monkeypatch.setattr(ray_command, "run_on_ray", lambda command, *_others: commands.append(command) or 0)
    assert main(["ray", "configs/llama7b.yaml", "--workers=2", "data.max_length=512", *flags]) == 0
    assert commands[0].words == ("train", "configs/llama7b.yaml", "data.max_length=512", *flags)


def test_an_error_is_a_json_line_too(tmp_path: Path) -> None:
    done = command("train", tmp_path / "none.yaml", "--log-format", "json")
    [line] = map(json.loads, done.stderr.splitlines())
    assert (done.returncode, line["level"]) == (2, "error")
    assert "none.yaml" in line["message"]


def test_quiet_and_verbose_exclude_each_other(tmp_path: Path) -> None:
    done = command("eval", tmp_path, "--quiet", "--verbose")
    assert done.returncode == 2
    assert "either --quiet or --verbose" in done.stderr


def test_control_characters_of_a_path_do_not_reach_a_terminal(tmp_path: Path) -> None:
    done = command("check", tmp_path / "\x1b[31mred\x07.yaml")
    assert done.returncode == 2
    assert control_characters(done.stderr) == set()
    assert "\\x1b[31mred\\x07.yaml" in done.stderr
