"""`run.samples`: answers to held-out prompts while a run trains, which do not change it."""

import errno
import json
import os
import shutil
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest

from qlora_train.config import load_config
from qlora_train.data.held_out_rows import load_rows
from qlora_train.evaluation.generation import generate_answers
from qlora_train.export.finished_run import open_finished_run
from qlora_train.inference.run_models import run_models
from qlora_train.runs import RunFolder
from qlora_train.training.held_out_samples import MAX_NEW_TOKENS, prompt_text
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ConfigError
from tests.support.pico import build_pico
from tests.support.ranked_runs import RankedRuns
from tests.support.runs import adapter_bytes, losses, make_config, metrics, stopped_after, train_run

SETTINGS = (
    "train.max_steps=6", "train.eval_steps=2", "train.save_steps=2", "lora.lora_dropout=0.1",
    "train.neftune_noise_alpha=5", "train.per_device_train_batch_size=4",
)  # fmt: skip
STEPS = [0, 2, 4, 6]


def samples(run: RunFolder) -> list[dict[str, object]]:
    return [json.loads(line) for line in run.samples_file.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("samples")


@pytest.fixture(scope="module")
def without(folder: Path, pico_llama: Path) -> RunFolder:
    return train_run(folder, pico_llama, *SETTINGS, name="without")


@pytest.fixture(scope="module")
def sampled(folder: Path, pico_llama: Path) -> RunFolder:
    return train_run(folder, pico_llama, *SETTINGS, "run.samples=2", name="sampled")


def test_training_is_bitwise_the_same_with_and_without_samples(without: RunFolder, sampled: RunFolder) -> None:
    assert losses(sampled) == losses(without)
    assert len(losses(sampled)) == 6
    assert [line["eval_loss"] for line in metrics(sampled) if "eval_loss" in line] == [
        line["eval_loss"] for line in metrics(without) if "eval_loss" in line
    ]
    assert adapter_bytes(sampled) == adapter_bytes(without)


def test_samples_are_answers_before_the_first_step_and_at_every_evaluation(
    without: RunFolder, sampled: RunFolder
) -> None:
    lines = samples(sampled)
    assert [(line["step"], line["row"]) for line in lines] == [(step, row) for step in STEPS for row in (0, 1)]
    held_out = list(load_rows(sampled.rows).eval)[:2]
    for line in lines:
        example = held_out[int(str(line["row"]))]
        assert example.prompt is not None
        assert (line["prompt"], line["expected"]) == (prompt_text(example.prompt), example.answer)
    assert len({str(line["generated"]) for line in lines}) > 1, "training changes them"
    assert not without.samples_file.exists()


def test_last_samples_are_what_the_finished_adapter_answers(sampled: RunFolder) -> None:
    """The reference is another process's path: the adapter loaded from its file, without fused kernels."""
    run = open_finished_run(sampled.path)
    [(_, model, tokenizer)] = run_models(run, ("adapter",))
    prompts = [row.prompt for row in list(load_rows(sampled.rows).eval)[:2] if row.prompt is not None]
    expected = generate_answers(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=2, date=run.date)
    last = [line["generated"] for line in samples(sampled) if line["step"] == 6]
    assert [str(answer)[:8] for answer in last] == [answer[:8] for answer in expected]


def test_resumed_run_keeps_earlier_samples_and_repeats_later_ones(
    sampled: RunFolder, folder: Path, pico_llama: Path
) -> None:
    stopped = stopped_after(4, sampled, folder / "stopped")
    assert [line["step"] for line in samples(stopped)] == [step for step in STEPS for _ in range(2)]
    config = make_config(folder, pico_llama, *SETTINGS, "run.samples=2", name="stopped")
    resumed = train_run(folder, pico_llama, *SETTINGS, "run.samples=2", name="stopped")
    assert str(resumed.path) == config.run.output_dir
    assert samples(resumed) == samples(sampled)
    assert adapter_bytes(resumed) == adapter_bytes(sampled)


def test_samples_may_change_when_a_run_resumes(sampled: RunFolder, folder: Path, pico_llama: Path) -> None:
    stopped_after(4, sampled, folder / "fewer")
    resumed = train_run(folder, pico_llama, *SETTINGS, "run.samples=1", name="fewer")
    assert [(line["step"], line["row"]) for line in samples(resumed) if line["step"] == 6] == [(6, 0)]


def test_a_new_run_in_the_folder_begins_without_old_samples(sampled: RunFolder, folder: Path, pico_llama: Path) -> None:
    copy = RunFolder(Path(shutil.copytree(sampled.path, folder / "again")))
    shutil.rmtree(copy.adapter)
    shutil.rmtree(copy.checkpoints)
    run = train_run(folder, pico_llama, *SETTINGS, "train.max_steps=1", name="again")
    assert not run.samples_file.exists()


def test_rank_0_answers_while_the_others_wait(tmp_path: Path) -> None:
    """Training, evaluations and the adapter are bitwise those without samples."""
    runs = RankedRuns(tmp_path, build_pico(tmp_path / "base", num_hidden_layers=1))
    settings = ("train.max_steps=4", "train.eval_steps=2", "train.save_steps=2", "data.eval=0.25")
    without, sampled = runs.new(), runs.new()
    adapter = runs.finished_by_ranks(without, 2, *settings)
    assert runs.finished_by_ranks(sampled, 2, *settings, "run.samples=2") == adapter
    assert losses(sampled) == losses(without)
    assert [(line["step"], line["row"]) for line in samples(sampled)] == [(s, row) for s in (0, 2, 4) for row in (0, 1)]
    stopped = stopped_after(2, sampled, tmp_path / "stopped")
    assert runs.finished_by_ranks(stopped, 2, *settings, "run.samples=2") == adapter
    assert samples(stopped) == samples(sampled)
    assert stopped.log_file.read_text().count("resumes from") == 1
    assert "resumes from" in stopped.rank_log(1).read_text(), "rank 1 has a log of its own"


def test_samples_that_fail_are_a_warning_and_the_run_is_the_same(
    without: RunFolder,
    folder: Path,
    pico_llama: Path,
    messages: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full_disk(path: Path) -> AbstractContextManager[None]:
        if "samples.jsonl" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return nullcontext()

    monkeypatch.setattr(atomic_io, "writing", full_disk)
    run = train_run(folder, pico_llama, *SETTINGS, "run.samples=2", name="full")
    assert messages.text.count("run.samples: off from step 0 on ([Errno 28] No space left on device)") == 1
    assert not run.samples_file.exists()
    assert adapter_bytes(run) == adapter_bytes(without)


def test_rows_without_a_prompt_are_a_warning(
    folder: Path, pico_llama: Path, messages: pytest.LogCaptureFixture
) -> None:
    rows = folder / "text.jsonl"
    rows.write_text("".join(json.dumps({"text": f"{number} and {number + 1}"}) + "\n" for number in range(12)))
    run = train_run(folder, pico_llama, f"data.train={rows}", "train.max_steps=1", "run.samples=2", name="text")
    assert "run.samples: no held-out row has a prompt and an answer as text" in messages.text
    assert not run.samples_file.exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("data.eval=null", "run.samples=2: needs held-out rows; set data.eval"),
        (
            "parallel.strategy=fsdp",
            "run.samples=2: rank 0 generates alone, which parallel.strategy: fsdp does not support",
        ),
    ],
)
def test_impossible_samples_are_refused(setting: str, message: str, folder: Path, pico_llama: Path) -> None:
    make_config(folder, pico_llama, name="refused")
    settings = [f"model.model_name_or_path={pico_llama}", f"data.train={folder / 'rows.jsonl'}", "data.eval=0.1"]
    with pytest.raises(ConfigError, match=message):
        load_config(folder / "refused.yaml", [*settings, "data.max_length=128", "run.samples=2", setting])
