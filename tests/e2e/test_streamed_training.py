"""Streamed runs: every row of an epoch is used once, and stopped runs resume bitwise."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_train.data import source_store, streaming
from qlora_train.data.worker_pool import ordered_map
from qlora_train.inference.eval_report import EvalSettings, evaluate
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.errors import DataError, TrainingError
from tests.support.runs import adapter_bytes, losses, make_config, stopped_after, train_run, write_rows

STREAMED = ("data.streaming=true", "train.max_steps=9", "train.save_steps=1", "data.num_proc=1")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_store, "CHUNK_BYTES", 300)
    monkeypatch.setattr(streaming, "WINDOW_CHUNKS", 3)


def settings_in(folder: Path) -> tuple[str, ...]:
    return (*STREAMED, f"data.eval={write_rows(folder / 'held.jsonl', count=6, seed=1)}")


def test_stopped_streamed_run_resumes_bitwise(pico_llama: Path, tmp_path: Path) -> None:
    settings = settings_in(tmp_path)
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    assert len(losses(straight)) == 9
    for step in (5, 8):  # an epoch of 24 rows ends after step 6
        stopped = stopped_after(step, straight, tmp_path / f"stopped-{step}")
        resumed = train_run(tmp_path, pico_llama, *settings, name=stopped.path.name)
        assert adapter_bytes(resumed) == adapter_bytes(straight), f"resumed after step {step}"
        assert losses(resumed) == losses(straight)


def test_epoch_of_a_stream_uses_every_row_once(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    locations: list[str] = []
    original = QloraTrainer.compute_loss

    def noting(
        self: QloraTrainer, model: torch.nn.Module, inputs: dict[str, torch.Tensor], *rest: Any, **more: Any
    ) -> Any:
        locations.extend(self.batch_source.location(int(row)) for row in inputs["row"])
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(QloraTrainer, "compute_loss", noting)
    run = train_run(tmp_path, pico_llama, *settings_in(tmp_path), "train.max_steps=6")
    assert sorted(locations) == sorted(f"{tmp_path / 'rows.jsonl'}:{number + 1}" for number in range(24))
    report = json.loads(run.data_report_file.read_text())
    assert report["is_streamed"]
    assert json.loads(run.metadata_file.read_text())["num_train_rows"] is None


def test_a_resumed_stream_tokenises_only_what_it_will_read(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_in(tmp_path)
    straight = train_run(tmp_path, pico_llama, *settings, name="straight")
    stopped = stopped_after(8, straight, tmp_path / "stopped")
    tokenised = []

    def counting(function, items, num_proc):  # type: ignore[no-untyped-def]
        for result in ordered_map(function, items, num_proc):
            tokenised.append(result)
            yield result

    monkeypatch.setattr(streaming, "ordered_map", counting)
    train_run(tmp_path, pico_llama, *settings, name=stopped.path.name)
    assert 0 < len(tokenised) < 12  # of the 14 chunks and more that lie before; the first window is always looked at


def test_bad_rows_later_in_the_stream_are_an_error(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, *settings_in(tmp_path))
    rows = Path(config.data.train[0].path)
    lines = rows.read_text().splitlines()
    lines[12:16] = ['{"messages": [{"role": "user", "content": "alone"}]}'] * 4
    rows.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        DataError,
        match=r"data.train: \d+ of the first \d+ rows of the stream .*, data.max_dropped \(0.01\)",
    ):
        train_run(tmp_path, pico_llama, *settings_in(tmp_path))


def test_non_finite_loss_names_rows_of_the_stream(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"rows of this step: .*rows.jsonl:\d+"):
        train_run(
            tmp_path, pico_llama, *settings_in(tmp_path), "train.learning_rate=1", "train.max_grad_norm=0",
            "train.optim=sgd", "lora.lora_alpha=1e20", "train.warmup_ratio=0",
        )  # fmt: skip


def test_first_rows_of_a_stream_are_the_few_shot_examples(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = train_run(tmp_path, pico_llama, *settings_in(tmp_path), "train.max_steps=2")
    with caplog.at_level("WARNING", logger="qlora_train"):
        results = evaluate(run.path, EvalSettings(models=("base", "adapter"), num_shots=3, max_new_tokens=2))
    assert set(results) == {"base", "adapter"}
    assert "solved examples" not in caplog.text


def test_changed_file_is_refused_on_resume(pico_llama: Path, tmp_path: Path) -> None:
    from qlora_train.utils.errors import CheckpointError

    settings = settings_in(tmp_path)
    run = train_run(tmp_path, pico_llama, *settings)
    shutil.rmtree(run.adapter)
    write_rows(tmp_path / "rows.jsonl", seed=9)
    with pytest.raises(CheckpointError, match="data_fingerprint was"):
        train_run(tmp_path, pico_llama, *settings)
