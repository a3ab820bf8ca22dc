"""The longest batch is tried before the first step; what does not fit goes down a ladder that changes no update."""

import json
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig
from qlora_train.data.batches import RowOrder
from qlora_train.data.packing import PackOrder
from qlora_train.errors import TrainingError, explain, is_out_of_memory
from qlora_train.trainer import ladder, trial
from qlora_train.trainer.ladder import next_rung, next_rung_of_evaluation, on_rung, overrides
from tests.runs import adapter_bytes, losses, make_config, metrics, train_run

ROOT = Path(__file__).parents[1]
EXACT = ("quantization.bnb_4bit_compute_dtype=float32", "train.save_steps=1")


# --- the ladder -------------------------------------------------------------------------------------------------------


def rungs(config: RunConfig) -> list[tuple[int, int, bool | str]]:
    """Return micro-batch, accumulation and recomputation at each rung, the configured one first."""
    found = []
    while True:
        train = config.train
        found.append(
            (train.per_device_train_batch_size, train.gradient_accumulation_steps, train.gradient_checkpointing)
        )
        rung = next_rung(config)
        if rung is None:
            return found
        config = on_rung(config, rung)


def test_micro_batches_shrink_and_the_global_batch_stays(pico_llama: Path, tmp_path: Path) -> None:
    batch = ("train.per_device_train_batch_size=12", "train.gradient_accumulation_steps=3")
    found = rungs(make_config(tmp_path, pico_llama, *batch))
    assert found == [(12, 3, "auto"), (6, 6, "auto"), (3, 12, "auto"), (1, 36, "auto"), (1, 36, True)]
    assert {size * steps for size, steps, _ in found} == {36}


def test_order_that_follows_from_the_micro_batch_keeps_it(pico_llama: Path, tmp_path: Path) -> None:
    found = rungs(make_config(tmp_path, pico_llama, "train.group_by_length=true"))
    assert found == [(2, 2, "auto"), (2, 2, True)]


def test_evaluation_batches_are_halved_down_to_one_row(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, "train.per_device_eval_batch_size=3")
    rung = next_rung_of_evaluation(config)
    assert rung == {"per_device_eval_batch_size": 1}
    assert next_rung_of_evaluation(on_rung(config, rung)) is None


def test_rungs_are_shown_as_people_type_them() -> None:
    rung = {"per_device_train_batch_size": 2, "gradient_checkpointing": True}
    assert overrides(rung) == "train.per_device_train_batch_size=2 train.gradient_checkpointing=true"


# --- the trial --------------------------------------------------------------------------------------------------------


def test_trial_leaves_no_trace(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout and noise draw random numbers; the run without the trial is made by taking the trial away."""
    settings = ("lora.lora_dropout=0.2", "train.neftune_noise_alpha=5", "train.eval_steps=2", "train.save_steps=2")
    tried = train_run(tmp_path, pico_llama, *settings, name="tried")
    monkeypatch.setattr(trial, "_try", lambda _trainer: None)
    untried = train_run(tmp_path, pico_llama, *settings, name="untried")
    assert adapter_bytes(tried) == adapter_bytes(untried)
    assert metrics_without_times(tried) == metrics_without_times(untried)


def metrics_without_times(run: RunFolder) -> list[dict[str, float]]:
    return [{key: value for key, value in line.items() if not key.endswith("seconds")} for line in metrics(run)]


def test_trial_is_of_the_longest_rows_and_is_logged(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="qlora_train"):
        train_run(tmp_path, pico_llama, "train.max_steps=1")
    longest = int(re.findall(r"data\.train: .* most (\d+);", caplog.text)[-1])
    assert f"the longest micro-batch has 2 rows, {2 * longest} tokens with padding, fits" in caplog.text


def test_longest_batch_is_at_least_as_long_as_any_that_comes() -> None:
    lengths = torch.randint(1, 500, (203,), generator=torch.Generator().manual_seed(0)).int().numpy()
    rows = RowOrder(lengths, seed=1, batch_size=4, group_by_length=False)
    packs = PackOrder(lengths, max_length=512, seed=1, batch_size=2)
    for epoch in range(5):
        padded = max(len(batch) * int(lengths[batch].max()) for batch in rows.of_epoch(epoch))
        assert padded <= 4 * int(lengths[rows.longest()].max())
        packed = max(int(lengths[batch].sum()) for batch in packs.of_epoch(epoch))
        assert packed <= int(lengths[packs.longest()].sum())


def test_what_runs_out_of_memory_is_told_from_other_errors() -> None:
    refused = "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."
    assert is_out_of_memory(RuntimeError(refused))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
    line = explain(RuntimeError(refused))
    assert line is not None
    assert line.startswith("out of memory: ")


# --- a system that refuses memory -------------------------------------------------------------------------------------

LIMITED = """
import resource, sys
import torch
torch.set_num_threads(1)
from qlora_train import cli
from qlora_train.trainer import fit

real = fit.fitting_trainer
def limited(*arguments, **keywords):
    with open("/proc/self/status") as file:
        used = next(int(line.split()[1]) for line in file if line.startswith("VmSize")) * 1024
    room = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
    return real(*arguments, **keywords)

fit.fitting_trainer = limited
sys.exit(cli.main(sys.argv[2:]))
"""
ROOM_BYTES = 500 << 20


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 1,000 tokens, eight of which take gigabytes of attention scores with eager attention."""
    folder = tmp_path_factory.mktemp("long")
    row = {"prompt": "1 + " * 240, "completion": "2 " * 10}
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(8)))
    return folder


@pytest.fixture(scope="module")
def long_base(pico: Callable[..., Path]) -> Path:
    """A base with as many positions."""
    return pico("llama", max_position_embeddings=2048)


def words(folder: Path, base: Path, *settings: str, name: str) -> list[str]:
    config = folder / "long.yaml"
    config.write_text(f"model:\n  model_name_or_path: {base}\ndata:\n  train: {folder / 'long.jsonl'}\n")
    return [
        str(config), f"run.output_dir={folder / name}", "model.attn_implementation=eager", "data.max_length=2048",
        "data.num_proc=1", "lora.r=4", "train.per_device_train_batch_size=8", "train.gradient_accumulation_steps=1",
        "train.max_steps=2", "train.learning_rate=1e-2", "quantization.bnb_4bit_compute_dtype=float32",
        "train.save_steps=1", *settings,
    ]  # fmt: skip


def limited(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LIMITED, str(ROOM_BYTES), *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


def test_batch_that_does_not_fit_is_told_before_the_first_step_with_what_would_fit(
    long_base: Path, long_rows: Path
) -> None:
    done = limited(words(long_rows, long_base, name="refused"))
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("out of memory: the longest micro-batch has 8 rows")
    assert "(tried: fits, with the same updates)" in line
    assert "train.auto_fit=true" in line
    assert RunFolder(long_rows / "refused").steps() == []
    typed = [word for word in line.split() if word.startswith("train.per_device") or word.startswith("train.grad")]
    again = limited(words(long_rows, long_base, *typed, name="refused"))
    assert again.returncode == 0, again.stderr


def test_run_that_may_fit_itself_finishes_with_the_same_updates(long_base: Path, long_rows: Path) -> None:
    fitted = limited(words(long_rows, long_base, "train.auto_fit=true", name="fitted"))
    assert fitted.returncode == 0, fitted.stderr
    assert "which changes no update" in fitted.stderr
    run = RunFolder(long_rows / "fitted")
    assert run.fit()["per_device_train_batch_size"] < 8
    assert run.fit()["per_device_train_batch_size"] * run.fit()["gradient_accumulation_steps"] == 8
    unlimited = subprocess.run(
        [sys.executable, "-m", "qlora_train.cli", *words(long_rows, long_base, name="unlimited")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert unlimited.returncode == 0, unlimited.stderr
    weights = [
        load_file(long_rows / name / "adapter" / "adapter_model.safetensors") for name in ("fitted", "unlimited")
    ]
    for name, tensor in weights[1].items():
        torch.testing.assert_close(weights[0][name], tensor, rtol=1e-3, atol=1e-4)


# --- out of memory in mid-run -----------------------------------------------------------------------------------------


def test_run_out_of_memory_in_mid_run_goes_on_one_rung_down(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = train_run(tmp_path, pico_llama, *EXACT, name="straight")
    real, num_calls = trial.fitting_trainer, 0

    def failing_once(*arguments: object, **keywords: object) -> object:
        trainer = real(*arguments, **keywords)  # type: ignore[arg-type]

        def refuse(_module: torch.nn.Module, _inputs: object) -> None:
            nonlocal num_calls
            num_calls += 1
            if num_calls == 5:  # the first micro-batch of step 3
                torch.empty(1 << 60)

        trainer.model.register_forward_pre_hook(refuse)
        return trainer

    monkeypatch.setattr("qlora_train.trainer.fit.fitting_trainer", failing_once)
    settings = (*EXACT, "train.auto_fit=true")
    with pytest.raises(TrainingError, match=r"out of memory after step 2; the same command goes on from the last"):
        train_run(tmp_path, pico_llama, *settings, name="hit")
    hit = RunFolder(tmp_path / "hit")
    assert hit.fit() == {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    train_run(tmp_path, pico_llama, *settings, name="hit")
    assert losses(hit) == pytest.approx(losses(straight), rel=1e-4)
    assert ladder.next_rung(on_rung(make_config(tmp_path, pico_llama), hit.fit())) == {"gradient_checkpointing": True}
