"""Losses of single rows after training: those of the model, of rows that were trained, and the wrong label comes first."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlora_train.adapters import load_trained
from qlora_train.data import Example
from qlora_train.evaluation.held_out_preferences import evaluate_preferences, preference_losses
from qlora_train.models import load_model
from qlora_train.runs import RunFolder, read_json
from qlora_train.training.row_losses import MIN_ROWS, _sample, record_row_losses
from qlora_train.utils import run_events
from tests.support.preference_pairs import write_pairs
from tests.support.runs import adapter_bytes, check_in_this_process, make_config, train_run
from tests.support.trainers import trainer_of

EXACT = ("quantization.bnb_4bit_compute_dtype=float32", "lora.r=16")
WRONG_ROW = 7
"""Line of the row with a wrong label."""


def write_labels(file: Path, count: int, wrong_line: int) -> Path:
    """Write equal rows, one of them with another label."""
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": "blue"}]
    wrong = [turns[0], {"role": "assistant", "content": "0123456789"}]
    rows = [{"messages": wrong if line == wrong_line else turns} for line in range(1, count + 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def run(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("labels")
    write_labels(folder / "rows.jsonl", 16, WRONG_ROW)
    held_out = write_labels(folder / "held.jsonl", 4, 2)
    with pytest.MonkeyPatch.context() as patch:
        check_in_this_process(patch)
        return train_run(folder, pico_llama, *EXACT, "train.max_steps=20", f"data.eval={held_out}")


def losses_of(run: RunFolder, split: str) -> dict[str, float]:
    part = read_json(run.row_losses_file)[split]
    return {row["where"]: row["loss"] for row in (*part["rows"], *part["other_rows"])}


def loss_by_hand(model: Any, tokenizer: Any, answer: str) -> float:
    """Return the mean NLL of the answer's tokens and of the end of the turn, by the model's own forward."""
    turns = [{"role": "user", "content": "sky?"}, {"role": "assistant", "content": answer}]
    prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, tokenize=False)
    text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip()  # a line break after the turn is no label
    num_prompt = len(tokenizer(prompt, add_special_tokens=False).input_ids)
    ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
    with torch.no_grad():
        log_probabilities = torch.log_softmax(model(ids).logits[0, :-1].float(), -1)
    nll = -log_probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]][num_prompt - 1 :]
    return float(nll.mean())


@pytest.mark.parametrize(("split", "wrong"), [("train", f"rows.jsonl:{WRONG_ROW}"), ("eval", "held.jsonl:2")])
def test_wrong_label_is_the_row_that_was_learnt_least(split: str, wrong: str, run: RunFolder) -> None:
    losses = losses_of(run, split)
    ranked = sorted(losses, key=lambda where: -losses[where])
    assert ranked[0] == str(run.path.parent / wrong)
    assert losses[ranked[0]] > 3 * losses[ranked[1]]
    first = read_json(run.row_losses_file)[split]["rows"][0]
    assert first["where"] == ranked[0]
    trained = "".join(part["text"] for part in first["sequences"][0]["segments"] if part["trained"])
    assert "0123456789" in trained


def test_losses_are_those_of_the_saved_adapter(run: RunFolder, pico_llama: Path) -> None:
    config = make_config(run.path.parent, pico_llama, *EXACT)
    loaded = load_model(config.model, config.quantization)
    model = load_trained(loaded, run.adapter)
    losses = losses_of(run, "train")
    by_hand = {answer: loss_by_hand(model, loaded.tokenizer, answer) for answer in ("0123456789", "blue")}
    assert len(losses) == 16
    for where, loss in losses.items():
        answer = "0123456789" if where.endswith(f":{WRONG_ROW}") else "blue"
        assert loss == pytest.approx(by_hand[answer], rel=1e-3)


def test_only_rows_that_were_trained_are_measured(pico_llama: Path, tmp_path: Path) -> None:
    trainer, data = trainer_of(make_config(tmp_path, pico_llama))  # 4 rows a step
    seen: set[str] = set()
    for step in list(trainer.batch_source.steps())[:2]:  # type: ignore[union-attr]
        seen |= {example.where for batch in step for _, example in batch}
    assert {row.where for row in trainer.batch_source.trained_rows(2)} == seen
    assert len(seen) == 8
    assert len(trainer.batch_source.trained_rows(100)) == len(data.train)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto"])
def test_their_progress_has_their_name(objective: str, pico_llama: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", count=10)
    settings = () if objective == "sft" else (f"train.objective={objective}", f"data.train={tmp_path / 'pairs.jsonl'}")
    trainer, data = trainer_of(make_config(tmp_path, pico_llama, *settings))
    rows = [data.train[index] for index in range(4)]  # type: ignore[index]
    events: list[Any] = []
    with run_events.listening(events.append):
        trainer.objective.row_losses(trainer.model, rows, batch_size=2, pad_token_id=0)
        trainer.objective.evaluate(trainer.model, rows, batch_size=2, pad_token_id=0)
    names = [event.name for event in events if isinstance(event, run_events.Progress)]
    assert list(dict.fromkeys(names)) == ["row losses", "evaluation"]


def test_sample_is_limited_in_rows_and_tokens() -> None:
    mask = torch.ones(10, dtype=torch.bool).numpy()
    rows = [Example(str(index), torch.arange(10, dtype=torch.int32).numpy(), mask) for index in range(100)]
    assert len(_sample(rows, 1000, math.inf, 0)) == 100
    assert len(_sample(rows, 30, math.inf, 0)) == 30
    assert len(_sample(rows, 1000, 805, 0)) == 80
    assert len(_sample(rows, 1000, 0, 0)) == MIN_ROWS
    assert len(_sample(rows, 5, 0, 0)) == 5
    assert [row.where for row in _sample(rows, 30, math.inf, 0)] == [
        row.where for row in _sample(rows, 30, math.inf, 0)
    ]
    assert len({row.where for row in _sample(rows, 30, math.inf, 0)}) == 30


def test_adapter_is_the_same_without_them(pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_this_process(monkeypatch)
    settings = ("train.max_steps=2", "data.eval=0.25")
    run = train_run(tmp_path, pico_llama, *settings)
    off = train_run(tmp_path, pico_llama, *settings, "run.row_losses=0", name="off")
    assert run.row_losses_file.exists()
    assert not off.row_losses_file.exists()
    assert adapter_bytes(run) == adapter_bytes(off)


def test_a_failure_does_not_end_a_run_that_is_trained(
    run: RunFolder, pico_llama: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    trainer, _ = trainer_of(make_config(tmp_path, pico_llama))
    shutil.copy(run.row_losses_file, trainer.run.row_losses_file)

    def fails(*_arguments: Any, **_keywords: Any) -> list[float]:
        raise RuntimeError("cuBLAS: no handle\nat line 1")

    trainer.state.global_step = 2
    trainer.objective = replace(trainer.objective, row_losses=fails)
    record_row_losses(trainer, 2)
    assert "row losses: not measured (cuBLAS: no handle)" in messages.text
    assert not trainer.run.row_losses_file.exists(), "those of another adapter are removed"


def test_loss_of_a_pair_has_the_sft_term_of_its_own_tokens(pico_llama: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", count=10, ragged=True)
    settings = ("train.objective=orpo", f"data.train={tmp_path / 'pairs.jsonl'}", *EXACT)
    trainer, data = trainer_of(make_config(tmp_path, pico_llama, *settings))
    pairs = [data.train[index] for index in range(4)]  # type: ignore[index]
    arguments: dict[str, Any] = {"batch_size": 2, "pad_token_id": 0}
    losses = trainer.objective.row_losses(trainer.model, pairs, **arguments)
    alone = [trainer.objective.evaluate(trainer.model, [pair], **arguments)["loss"] for pair in pairs]
    assert losses == pytest.approx(alone, rel=1e-4)
    means = trainer.objective.evaluate(trainer.model, pairs, **arguments)
    by_token = [pair.sequences[0].loss_mask.sum() for pair in pairs]
    assert len(set(by_token)) > 1
    of_pair = [trainer.objective.evaluate(trainer.model, [pair], **arguments)["nll_loss"] for pair in pairs]
    assert means["nll_loss"] == pytest.approx(np.average(of_pair, weights=by_token), rel=1e-4)


def test_losses_of_pairs_have_the_mean_that_evaluation_reports(pico_llama: Path, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs.jsonl", count=10)
    settings = ("train.objective=dpo", f"data.train={tmp_path / 'pairs.jsonl'}", *EXACT)
    trainer, data = trainer_of(make_config(tmp_path, pico_llama, *settings))
    pairs = [data.train[index] for index in range(5)]  # type: ignore[index]
    arguments: dict[str, Any] = {"batch_size": 2, "pad_token_id": 0}
    losses = preference_losses(trainer.objective.loss, trainer.model, pairs, **arguments)  # type: ignore[arg-type]
    means = evaluate_preferences(trainer.objective.loss, trainer.model, pairs, **arguments)  # type: ignore[arg-type]
    assert sum(losses) / 5 == pytest.approx(means["loss"])
    one_by_one = [
        preference_losses(trainer.objective.loss, trainer.model, [pair], **arguments)[0]  # type: ignore[arg-type]
        for pair in pairs
    ]
    assert losses == pytest.approx(one_by_one, rel=1e-4)
