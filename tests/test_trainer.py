"""What is trained is what the config says: the loss, its normalisation, its order, and no number that is not finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file
from torch.nn import functional

from qlora_train.adapter import AdaptedModel, attach_adapter, trainable_state
from qlora_train.checkpoint import RunFolder
from qlora_train.config import RunConfig
from qlora_train.data import PreparedData
from qlora_train.errors import ConfigError
from qlora_train.loader import load_model
from qlora_train.loss import label_losses
from qlora_train.pipeline import prepare
from qlora_train.trainer import QloraTrainer, train
from tests.runs import losses, make_config, metrics, train_run

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


def test_without_the_handling_an_evaluation_would_damage_gradients(pico_llama: Path, tmp_path: Path) -> None:
    adapted, data, _ = build(make_config(tmp_path, pico_llama))
    layers = [module for module in adapted.model.modules() if isinstance(module, Linear4bit)]
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip("only CPUs with AVX512-BF16 repack weights")
    ids = torch.tensor([data.train[0].input_ids], dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}

    def gradient() -> torch.Tensor:
        adapted.model.train().zero_grad()
        label_losses(adapted.model, **batch).nats.sum().backward()
        return torch.cat([p.grad.flatten() for p in trainable_state(adapted.model).values() if p.grad is not None])

    before = gradient()
    for layer in layers:
        layer.support_avx512bf16_for_cpu = True
    with torch.no_grad():
        adapted.model.eval()(input_ids=ids)
    assert functional.cosine_similarity(before, gradient(), dim=0) < 0.9


@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "cohere"])
def test_loss_of_labels_equals_the_plain_one(family: str, pico: Any, tmp_path: Path) -> None:
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
    found, of_row = losses.nats, losses.of_row
    logits = adapted.model(input_ids=ids, attention_mask=mask).logits.float()
    wanted = []
    for i in range(3):
        for position in range(1, longest):
            if labels[i, position] != -100:
                wanted.append(-torch.log_softmax(logits[i, position - 1], 0)[labels[i, position]])
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert of_row.bincount().tolist() == [sum(row.loss_mask) for row in rows]


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


def test_early_stopping_stops_after_evaluations_without_progress(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(
        tmp_path, pico_llama, "train.max_steps=30", "train.eval_steps=1", "train.early_stopping_patience=2",
        "train.learning_rate=0.05", "train.lr_scheduler_type=constant",
    )  # fmt: skip
    evaluations = [line["eval_loss"] for line in metrics(run) if "eval_loss" in line]
    assert len(evaluations) < 30
    assert min(evaluations[-2:]) >= min(evaluations[:-2]), "the last two brought nothing"
    assert len(evaluations) - 1 - evaluations.index(min(evaluations)) == 2


def test_memory_saving_settings_do_not_change_the_gradient(pico_llama: Path, tmp_path: Path) -> None:
    plain = train_run(tmp_path, pico_llama, *EXACT, "train.gradient_checkpointing=false", name="plain")
    recomputed = train_run(tmp_path, pico_llama, *EXACT, "train.gradient_checkpointing=true", name="recomputed")
    assert losses(recomputed) == pytest.approx(losses(plain), rel=1e-5)


def test_noise_on_the_embeddings_changes_training_and_is_gone_afterwards(pico_llama: Path, tmp_path: Path) -> None:
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


def test_missing_tracker_is_named_before_the_model_loads(pico_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.report_to: mlflow is not installed; run: pip install mlflow"):
        train_run(tmp_path, pico_llama, "run.report_to=[mlflow]")
