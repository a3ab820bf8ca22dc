"""A stopped run resumes to the same weights as one that was never stopped."""

import datetime
import gc
import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file

from qlora_train.data import prepare_data
from qlora_train.export.merging import merge_finished_run
from qlora_train.export.merging.merge_finished_run import merge
from qlora_train.pipeline import run
from qlora_train.planning import base_and_data
from qlora_train.runs import RunFolder, run_folder, run_lock
from qlora_train.utils.errors import CheckpointError
from tests.support.runs import adapter_bytes, losses, make_config, metrics, stopped_after, train_run

EVERY_STEP = ("train.save_steps=1",)
VARIANTS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (
        "train.optim=adamw_torch", "lora.lora_dropout=0.1", "train.eval_steps=2", "data.eval=0.25",
        "train.warmup_ratio=0.7",
    ),
    "paged_adamw_8bit": ("train.optim=paged_adamw_8bit", "lora.r=64", "train.neftune_noise_alpha=5"),
    "epochs, grouped": ("train.group_by_length=true", "train.logging_steps=3", "train.gradient_checkpointing=full"),
}  # fmt: skip
STEPS = {"adamw_torch": (1, 4, 6), "paged_adamw_8bit": (4,), "epochs, grouped": (4, 5)}
"""Steps to resume from: 18 rows in batches of 2 x 2 are 5 steps per epoch; 6 is the last step."""


def training(run: RunFolder) -> dict[str, Any]:
    """Return the training results of results.json."""
    result: dict[str, Any] = run.read_results()["training"]
    return result


@pytest.fixture(scope="module")
def straight(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run that was never stopped, with a checkpoint of every step."""
    return train_run(tmp_path_factory.mktemp("straight"), pico_llama, *EVERY_STEP, name="straight")


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_in_the_same_bits(variant: str, pico_llama: Path, tmp_path: Path) -> None:
    settings = (*EVERY_STEP, *VARIANTS[variant])
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    for step in STEPS[variant]:
        stopped = stopped_after(step, straight, tmp_path / f"stopped-{step}")
        resumed = train_run(tmp_path, pico_llama, *settings, name=stopped.path.name)
        assert adapter_bytes(resumed) == adapter_bytes(straight), f"resumed after step {step}"
        assert losses(resumed) == losses(straight)
        assert training(resumed)["train_loss"] == training(straight)["train_loss"]


def test_8_bit_optimizer_state_is_really_8_bit_in_the_checkpoint(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=1", *EVERY_STEP, *VARIANTS["paged_adamw_8bit"])
    state = load_file(run.checkpoint(1) / "optimizer.safetensors")
    dtypes = {str(tensor.dtype) for tensor in state.values() if tensor.numel() >= 4096}
    assert dtypes == {"torch.uint8"}


def test_adapter_is_float32_in_training_and_on_disk(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=1", *EVERY_STEP)
    for file in (run.checkpoint(1) / "adapter.safetensors", run.adapter / "adapter_model.safetensors"):
        assert {str(tensor.dtype) for tensor in load_file(file).values()} == {"torch.float32"}


def test_damaged_checkpoint_is_skipped_for_the_one_before(
    straight: RunFolder, pico_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stopped = stopped_after(4, straight, straight.path.with_name("damaged"))
    file = stopped.checkpoint(4) / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with caplog.at_level("WARNING", logger="qlora_train"):
        assert stopped.latest_checkpoint() == stopped.checkpoint(3)
    assert "optimizer.safetensors has changed" in caplog.text
    resumed = train_run(straight.path.parent, pico_llama, *EVERY_STEP, name="damaged")
    assert adapter_bytes(resumed) == adapter_bytes(straight)


def test_finished_run_is_not_trained_again(pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=2")
    before = adapter_bytes(run), run.metrics_file.read_text()
    with caplog.at_level("DEBUG", logger="qlora_train"):
        again = train_run(tmp_path, pico_llama, "train.max_steps=2", "export.merge=true")
    assert "has finished already" in caplog.text
    assert (adapter_bytes(again), again.metrics_file.read_text()) == before
    assert (again.merged / "model.safetensors").is_file()


def test_changed_setting_is_refused_with_old_and_new_value(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=2", *EVERY_STEP)
    shutil.rmtree(run.adapter)
    with pytest.raises(CheckpointError, match=r"train\.learning_rate was 0\.01 .* is 0\.02 now"):
        train_run(tmp_path, pico_llama, "train.max_steps=2", *EVERY_STEP, "train.learning_rate=2e-2")


def test_changed_data_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=2", *EVERY_STEP)
    shutil.rmtree(run.adapter)
    rows = (tmp_path / "rows.jsonl").read_text().splitlines()
    (tmp_path / "rows.jsonl").write_text("\n".join(rows[1:]) + "\n")
    with pytest.raises(CheckpointError, match="data_fingerprint was"):
        train_run(tmp_path, pico_llama, "train.max_steps=2", *EVERY_STEP)


def test_resume_never_does_not_touch_an_existing_run(pico_llama: Path, tmp_path: Path) -> None:
    train_run(tmp_path, pico_llama, "train.max_steps=1")
    with pytest.raises(CheckpointError, match="--resume never would overwrite"):
        train_run(tmp_path, pico_llama, "train.max_steps=1", resume="never")


def test_folder_of_something_else_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        train_run(tmp_path, pico_llama)


BEST_IS_NOT_LAST = (
    "train.max_steps=3", "train.save_steps=1", "train.eval_steps=1", "train.load_best_model_at_end=true",
    "train.learning_rate=0.02", "train.lr_scheduler_type=constant",
)  # fmt: skip


def test_rotation_keeps_the_latest_and_the_best_and_the_run_ends_with_the_best(
    pico_llama: Path, tmp_path: Path
) -> None:
    run = train_run(tmp_path, pico_llama, *BEST_IS_NOT_LAST, "train.save_total_limit=1")
    evaluations = {line["step"]: line["eval_loss"] for line in metrics(run) if "eval_loss" in line}
    best = min(evaluations, key=lambda step: evaluations[step])
    assert best < 3, "the learning rate should have made the last steps worse"
    assert run.checkpoint_steps() == [best, 3]
    assert training(run)["taken_from_step"] == best
    assert training(run)["eval_loss"] == evaluations[best]
    stored = load_file(run.checkpoint(best) / "adapter.safetensors")
    finished = load_file(run.adapter / "adapter_model.safetensors")
    assert sorted(float(t.sum()) for t in stored.values()) == sorted(float(t.sum()) for t in finished.values())


def test_run_killed_at_its_end_still_ends_with_the_best(pico_llama: Path, tmp_path: Path) -> None:
    straight = train_run(tmp_path, pico_llama, *BEST_IS_NOT_LAST, name="straight")
    for step in (2, 3):
        stopped = stopped_after(step, straight, tmp_path / f"stopped-{step}")
        resumed = train_run(tmp_path, pico_llama, *BEST_IS_NOT_LAST, name=stopped.path.name)
        assert adapter_bytes(resumed) == adapter_bytes(straight)
        assert training(resumed)["taken_from_step"] == training(straight)["taken_from_step"]


def test_run_killed_after_early_stopping_does_not_train_on(pico_llama: Path, tmp_path: Path) -> None:
    settings = (
        "train.max_steps=30", "train.eval_steps=1", "train.save_steps=1", "train.early_stopping_patience=1",
        "train.learning_rate=0.02", "train.lr_scheduler_type=constant",
    )  # fmt: skip
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    assert straight.checkpoint_steps()[-1] < 30
    stopped = stopped_after(straight.checkpoint_steps()[-1], straight, tmp_path / "stopped")
    resumed = train_run(tmp_path, pico_llama, *settings, name=stopped.path.name)
    assert resumed.checkpoint_steps() == straight.checkpoint_steps()
    assert adapter_bytes(resumed) == adapter_bytes(straight)


def test_a_named_checkpoint_is_resumed_from_and_later_ones_are_deleted(straight: RunFolder, pico_llama: Path) -> None:
    again = stopped_after(6, straight, straight.path.with_name("again"))
    settings = (*EVERY_STEP, "train.save_total_limit=2")
    resumed = train_run(straight.path.parent, pico_llama, *settings, name="again", resume=str(again.checkpoint(2)))
    assert adapter_bytes(resumed) == adapter_bytes(straight)
    assert resumed.checkpoint_steps() == [5, 6]
    assert losses(resumed) == losses(straight)


def test_checkpoint_of_another_run_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    other = train_run(tmp_path, pico_llama, "train.max_steps=1", *EVERY_STEP, "train.learning_rate=0.5", name="other")
    with pytest.raises(CheckpointError, match="is no checkpoint of this run"):
        train_run(tmp_path, pico_llama, *EVERY_STEP, name="fresh", resume=str(other.checkpoint(1)))


def test_torn_last_line_of_the_metrics_does_not_stop_a_resume(straight: RunFolder, pico_llama: Path) -> None:
    stopped = stopped_after(4, straight, straight.path.with_name("torn"))
    with stopped.metrics_file.open("a") as file:
        file.write('{"step": 7, "lo')
    resumed = train_run(straight.path.parent, pico_llama, *EVERY_STEP, name="torn")
    assert metrics(resumed)[-1]["step"] == 6
    assert losses(resumed) == losses(straight)


def test_run_folder_belongs_to_one_process(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama)
    with run_lock(RunFolder(tmp_path / "run")), pytest.raises(CheckpointError, match=rf"process {os.getpid()} on"):
        run(config)


def test_merge_refuses_a_base_that_is_not_the_one_trained_on(
    pico: Callable[..., Path], pico_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(pico_llama, base)
    finished = train_run(tmp_path, base, "train.max_steps=1")
    shutil.copy(pico("llama", seed=1) / "model.safetensors", base / "model.safetensors")
    with pytest.raises(CheckpointError, match="base_identity was"):
        merge(finished.path)


def test_finished_run_is_merged_as_the_command_line_says(pico_llama: Path, tmp_path: Path) -> None:
    train_run(tmp_path, pico_llama, "train.max_steps=1")
    merging = ("export.merge=true", "export.merge_base=original", "export.max_loss_increase=10")
    merged = train_run(tmp_path, pico_llama, "train.max_steps=1", *merging)
    assert merged.read_results()["merge"]["merge_base"] == "original"
    with pytest.raises(CheckpointError, match=r"lora\.r was 8"):
        merge(merged.path, ["lora.r=4"])


def test_trained_model_is_freed_before_the_merge(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive = []

    def count(*_arguments: Any) -> None:
        alive.append(sum(isinstance(item, Linear4bit) for item in gc.get_objects()))

    monkeypatch.setattr(merge_finished_run, "merge_run", count)
    gc.collect()
    before = sum(isinstance(item, Linear4bit) for item in gc.get_objects())
    train_run(tmp_path, pico_llama, "train.max_steps=1", "export.merge=true")
    assert alive == [before]


def test_run_stays_at_the_commit_of_the_hub_that_it_began_with(pico_llama: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = make_config(tmp_path, pico_llama).model
    folder = RunFolder(tmp_path)
    assert folder.with_pinned_revision(model).revision is None
    folder.metadata_file.write_text(f'{{"base_identity": "{commit}"}}')
    assert folder.with_pinned_revision(model).revision == commit


def test_a_run_whose_data_takes_past_midnight_keeps_the_day_of_its_rows(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every look at the calendar is a day later; rows are rendered for the day that the run records."""
    days = map(datetime.date.fromordinal, itertools.count(datetime.date(2026, 1, 1).toordinal()))
    rendered = []

    class Calendar(datetime.date):
        @classmethod
        def today(cls) -> Any:
            return next(days)

    def recorded(*arguments: Any, date: datetime.date, **keywords: Any) -> Any:
        rendered.append(date)
        return prepare_data(*arguments, date=date, **keywords)

    monkeypatch.setattr(run_folder, "datetime", SimpleNamespace(date=Calendar))
    monkeypatch.setattr(base_and_data, "prepare_data", recorded)
    trained = train_run(tmp_path, pico_llama, "train.max_steps=1")
    assert [trained.metadata()["date"]] == [day.isoformat() for day in rendered]
