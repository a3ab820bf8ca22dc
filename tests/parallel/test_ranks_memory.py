"""Out of memory on one rank: under fsdp the run ends, and no rank waits for another; ranks record one fallback."""

import re
from collections.abc import Callable
from pathlib import Path

from qlora_train.config import RunConfig
from qlora_train.runs import read_json
from tests.support.ranks_memory import (
    measure_row_losses_with_too_little_memory,
    run_out_of_memory_in_turn,
    train_with_too_little_memory,
)
from tests.support.runs import make_config
from tests.support.trainers import folder_of
from tests.support.workers import run_workers

Pico = Callable[..., Path]
SETTINGS = ("parallel.strategy=fsdp", "data.eval=null", "train.eval_steps=null", "train.max_steps=1")
PROBE_ONLY = ("train.fused_kernels=false", "train.padding_free=false")


def train_in_two_ranks(folder: Path, config: RunConfig, max_rows: int) -> list[str]:
    folder.mkdir()
    return run_workers(train_with_too_little_memory, 2, folder, config, max_rows)


def test_parity_check_without_memory_on_one_rank_ends_instead_of_a_hang(pico: Pico, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico("llama"), *SETTINGS)
    first, second = train_in_two_ranks(tmp_path / "ranks", config, 1)
    assert "Connection closed by peer" in first
    assert second.startswith(
        "fused kernels: out of memory in the parity check on 4 x 128 tokens (CUDA out of memory); "
    )
    assert "lower train.per_device_train_batch_size, start more processes, or free memory" in second
    assert not folder_of(config).fused_kernels_file.exists()


def test_probe_without_memory_on_one_rank_ends_and_the_next_start_uses_less(pico: Pico, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico("llama"), *SETTINGS, *PROBE_ONLY, "train.auto_find_batch_size=true")
    first, second = train_in_two_ranks(tmp_path / "ranks", config, 1)
    assert "Connection closed by peer" in first
    assert second == (
        "memory probe: out of memory (CUDA out of memory); complete checkpoints are intact; repeat the command: the run "
        "resumes with train.per_device_train_batch_size=1 train.gradient_accumulation_steps=4; or start more processes: "
        "each then holds less of the base"
    )
    assert train_in_two_ranks(tmp_path / "again", config, 1) == ["trained", "trained"]


def test_ranks_that_run_out_of_memory_together_record_one_fallback(pico: Pico, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico("llama"), "train.padding_free=false")
    run = folder_of(config)
    run.path.mkdir()
    first, second = run_workers(run_out_of_memory_in_turn, 2, tmp_path, config)
    assert first == second
    assert first.endswith("repeat the command: the run resumes with smaller micro-batches")
    assert read_json(run.padding_free_file)["min_tokens"] == 0
    assert not run.fitted_settings_file.exists()


def test_row_losses_without_memory_on_one_rank_are_a_warning_on_both(pico: Pico, tmp_path: Path) -> None:
    """Their collectives stay in step: the sum that follows is that of two ranks."""
    config = make_config(
        tmp_path, pico("llama"), "train.padding_free=false", "data.eval=0.25", "train.per_device_eval_batch_size=1"
    )
    folder_of(config).path.mkdir()
    (warnings, total), of_rank_1 = run_workers(measure_row_losses_with_too_little_memory, 2, tmp_path, config)
    assert (warnings, total) == of_rank_1
    assert total == 6
    expected = r"row losses: not measured \(out of memory: one row of \d+ tokens does not fit \(CUDA out of memory\);"
    assert [bool(re.match(expected, line)) for line in warnings if line.startswith("row losses")] == [True]
    assert not folder_of(config).row_losses_file.exists()
