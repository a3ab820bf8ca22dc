"""Loss, normalisation, evaluation, learning rate and early stopping are those of the config."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.nn import functional
from transformers import get_scheduler

from qlora_train.adapters import AdaptedModel, attach_adapter, trainable_state
from qlora_train.config import RunConfig, load_config
from qlora_train.config.schema import SCHEDULES
from qlora_train.data import PreparedData
from qlora_train.models import load_model
from qlora_train.objectives.label_losses import label_losses
from qlora_train.pipeline import run
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training import QloraTrainer, train
from qlora_train.training.lr_schedule import make_lr_scheduler
from qlora_train.utils.errors import ConfigError, TrainingError
from tests.support.runs import losses, make_config, metrics, train_run, write_rows

EXACT = ("quantization.bnb_4bit_compute_dtype=float32",)


def build(config: RunConfig) -> tuple[AdaptedModel, PreparedData, RunFolder]:
    folder = RunFolder(Path(str(config.run.output_dir)))
    source, data = prepare(config, folder)
    loaded = load_model(config.model, config.quantization, source=source)
    return attach_adapter(loaded, config.lora, seed=config.run.seed), data, folder


def test_training_after_evaluations_equals_training_without_them(pico_llama: Path, tmp_path: Path) -> None:
    never = train_run(tmp_path, pico_llama, "train.eval_steps=100", name="never")
    often = train_run(tmp_path, pico_llama, "train.eval_steps=1", name="often")
    assert losses(often) == losses(never)
    assert len([line for line in metrics(often) if "eval_loss" in line]) == 6


def test_bitsandbytes_repacking_would_damage_gradients(pico_llama: Path, tmp_path: Path) -> None:
    adapted, data, _ = build(make_config(tmp_path, pico_llama))
    layers = [module for module in adapted.model.modules() if isinstance(module, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("only CPUs with AVX512-BF16 repack weights")
    ids = torch.tensor([data.train[0].input_ids], dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def gradient() -> torch.Tensor:
        adapted.model.train().zero_grad()
        label_losses(adapted.model, **batch).nll.sum().backward()
        return torch.cat([p.grad.flatten() for p in trainable_state(adapted.model).values() if p.grad is not None])

    before = gradient()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        adapted.model.eval()(input_ids=ids)
    assert functional.cosine_similarity(before, gradient(), dim=0) < 0.9


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_label_losses_equal_log_softmax(family: str, pico: Any, tmp_path: Path) -> None:
    adapted, data, _ = build(make_config(tmp_path, pico(family), *EXACT))
    rows = sorted(data.train, key=lambda example: len(example.input_ids))[-3:]
    longest = len(rows[-1].input_ids)
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        ids[i, :length], mask[i, :length] = torch.tensor(row.input_ids), 1
        labels[i, :length] = torch.where(torch.tensor(row.loss_mask), ids[i, :length], -100)
    losses = label_losses(adapted.model, input_ids=ids, attention_mask=mask, labels=labels)
    found, row_index = losses.nll, losses.row_index
    logits = adapted.model(input_ids=ids, attention_mask=mask).logits.float()
    wanted = []
    for i in range(3):
        for position in range(1, longest):
            if labels[i, position] != -100:
                wanted.append(-torch.log_softmax(logits[i, position - 1], 0)[labels[i, position]])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert row_index.bincount().tolist() == [sum(row.loss_mask) for row in rows]


def test_every_split_of_the_batch_gives_the_same_update(pico_llama: Path, tmp_path: Path) -> None:
    updates = []
    for rows, steps in ((8, 1), (4, 2), (2, 4), (1, 8)):
        run = train_run(
            tmp_path, pico_llama, *EXACT, "data.eval=0.5", "train.optim=sgd", "train.max_grad_norm=0",
            "train.lr_scheduler_type=constant", "train.warmup_ratio=0", "train.learning_rate=1", "train.max_steps=1",
            f"train.per_device_train_batch_size={rows}", f"train.gradient_accumulation_steps={steps}",
            name=f"{rows}x{steps}",
        )  # fmt: skip
        updates.append(load_file(run.adapter / "adapter_model.safetensors"))
    for other in updates[1:]:
        for name, tensor in updates[0].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6)


def test_eval_loss_is_total_likelihood_over_total_tokens(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, *EXACT)
    adapted, data, folder = build(config)
    trainer = QloraTrainer(adapted, data, config, folder, [])
    total, count = 0.0, 0
    for row in data.eval:
        ids = torch.tensor([row.input_ids])
        with torch.no_grad():
            logits = adapted.model(input_ids=ids).logits[0].float()
        for position in range(1, ids.shape[1]):
            if row.loss_mask[position]:
                total -= float(torch.log_softmax(logits[position - 1], 0)[ids[0, position]])
                count += 1
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-4)


def test_one_default_step_changes_every_lora_b(pico_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "one_step.yaml"
    file.write_text(
        f"model: {{model_name_or_path: {pico_llama}}}\n"
        f"data: {{train: {write_rows(tmp_path / 'rows.jsonl', count=12)}, max_length: 256}}\n"
        f"run: {{output_dir: {tmp_path / 'run'}}}\n"
    )
    folder = run(load_config(file))
    matrices = load_file(folder.adapter / "adapter_model.safetensors")
    assert all(matrix.any() for name, matrix in matrices.items() if ".lora_B." in name)
    [line] = metrics(folder)
    assert (line["step"], line["learning_rate"]) == (1, 1e-4), "half of the peak in one warm-up step"
    assert line["loss"] == pytest.approx(folder.read_results()["training"]["train_loss"])


def test_run_that_trains_nothing_is_an_error(pico_llama: Path, tmp_path: Path) -> None:
    too_low = ("train.optim=sgd", "train.learning_rate=1e-60", "train.max_steps=2")
    with pytest.raises(TrainingError, match=r"^step 2: every lora_B is zero: .* after 2 updates; .* not written"):
        train_run(tmp_path, pico_llama, *too_low)
    assert not RunFolder(tmp_path / "run").is_finished()


@pytest.mark.parametrize("num_warmup_steps", [0, 1, 3, 10])
@pytest.mark.parametrize("name", get_args(SCHEDULES))
def test_warm_up_starts_above_zero_then_follows_transformers(name: str, num_warmup_steps: int) -> None:
    def rates(make: Callable[..., Any]) -> list[float]:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=2e-4)
        schedule = make(name, optimizer, num_warmup_steps=num_warmup_steps, num_training_steps=10)
        found = []
        for _ in range(10):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        return found

    found = rates(make_lr_scheduler)
    assert min(found) > 0
    rise = 0 if name == "constant" else num_warmup_steps
    assert found[:rise] == pytest.approx([2e-4 * (step + 1) / (rise + 1) for step in range(rise)])
    if num_warmup_steps < 10:  # polynomial of Transformers fails without a step after its warm-up
        assert found[rise:] == rates(get_scheduler)[rise:]


def test_last_steps_are_logged_in_a_shorter_window(pico_llama: Path, tmp_path: Path) -> None:
    every_step = losses(train_run(tmp_path, pico_llama, "train.max_steps=5", name="every"))
    run = train_run(tmp_path, pico_llama, "train.max_steps=5", "train.logging_steps=3", name="partial")
    windows = [sum(every_step[:3]) / 3, sum(every_step[3:]) / 2]
    assert losses(run) == pytest.approx(windows, rel=1e-5)
    assert [line["step"] for line in metrics(run) if "loss" in line] == [3, 5]


def test_early_stopping_logs_every_step(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(
        tmp_path, pico_llama, "train.max_steps=30", "train.eval_steps=1", "train.early_stopping_patience=1",
        "train.learning_rate=1", "train.lr_scheduler_type=constant", "train.logging_steps=100",
    )  # fmt: skip
    steps = run.read_results()["training"]["steps"]
    assert steps < 30
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, steps + 1))


def test_early_stopping_stops_after_evaluations_without_progress(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(
        tmp_path, pico_llama, "train.max_steps=30", "train.eval_steps=1", "train.early_stopping_patience=2",
        "train.learning_rate=0.05", "train.lr_scheduler_type=constant",
    )  # fmt: skip
    evaluations = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert len(evaluations) < 30
    assert min(evaluations[-2:]) >= min(evaluations[:-2]), "the last two were no better"
    assert len(evaluations) - 1 - evaluations.index(min(evaluations)) == 2


def test_neftune_changes_training_and_is_removed_afterwards(pico_llama: Path, tmp_path: Path) -> None:
    plain = train_run(tmp_path, pico_llama, name="plain")
    noisy = train_run(tmp_path, pico_llama, "train.neftune_noise_alpha=15", name="noisy")
    assert losses(noisy)[0] != losses(plain)[0]
    config = make_config(tmp_path, pico_llama, "train.neftune_noise_alpha=15", name="after")
    adapted, data, folder = build(config)
    folder.path.mkdir()
    train(adapted, data, config, folder, None)
    ids = torch.tensor([data.train[0].input_ids], dtype=torch.long)
    with torch.no_grad():
        adapted.model.train()
        first, second = (adapted.model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(first, second)


def test_missing_tracker_is_an_error_before_the_model_loads(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.report_to: wandb is not installed; run: pip install wandb"):
        train_run(tmp_path, pico_llama, "run.report_to=[wandb]")
