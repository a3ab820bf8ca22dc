"""A second objective is an addition: the trainer divides, logs, evaluates and resumes it as it does SFT."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qlora_train.adapters import attach_adapter, trainable_state
from qlora_train.config import RunConfig
from qlora_train.data.token_store import Rows
from qlora_train.data.types import Example
from qlora_train.evaluation.objective_table import Objective
from qlora_train.models import load_model, resolve_base
from qlora_train.objectives.batch_loss import Batch, BatchLoss, model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from qlora_train.runs import RunFolder
from qlora_train.training import train
from tests.support.runs import make_config, metrics
from tests.support.trainers import DATE

SETTINGS = (
    "quantization.bnb_4bit_compute_dtype=float32", "train.fused_kernels=false", "train.eval_steps=4",
    "data.train_on=all", "train.gradient_accumulation_steps=20",  # a step is an epoch of rows of different length
)  # fmt: skip
NUM_HELD_OUT = 8
"""Of the 24 rows, by `data.eval=0.25` and the seed."""


class RowMeanLoss:
    """The mean over rows of each row's mean loss, with the length of rows as a metric; its items are rows."""

    log_formats: Mapping[str, str] = {"row_labels": "labels {:.1f}", "eval_rows": "held-out rows {:.0f}"}

    def num_items(self, batch: Batch) -> int:
        return len(batch["row"])

    def num_sft_tokens(self, batch: Batch) -> int:
        return 0

    def __call__(self, model: nn.Module, batch: Batch, *, chunk_tokens: int | None, with_aux_loss: bool) -> BatchLoss:
        inputs: dict[str, Any] = model_inputs(batch)
        losses = label_losses(model, chunk_tokens, with_aux_loss=with_aux_loss, **inputs)
        counts = torch.bincount(losses.row_index, minlength=len(batch["row"]))
        total = (losses.nll / counts[losses.row_index]).sum()
        return BatchLoss(total, losses.aux_loss, {"row_labels": counts.sum()})


def count_rows(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> dict[str, float]:
    return {"loss": 0.5, "rows": float(len(examples))}


def row_lengths(model: Any, examples: Sequence[Example], *, batch_size: int, pad_token_id: int) -> list[float]:
    return [float(len(example.input_ids)) for example in examples]


ROW_MEAN = Objective(RowMeanLoss(), count_rows, row_lengths)


def train_row_means(config: RunConfig, resume_from: Path | None = None) -> tuple[RunFolder, dict[str, torch.Tensor]]:
    """Train with the objective, and return the trained tensors."""
    source = resolve_base(config.model)
    data, _ = prepare_tokenizer_and_data(config, source, date=DATE)
    adapted = attach_adapter(load_model(config.model, config.quantization, source=source), config.lora, seed=7)
    assert config.run.output_dir is not None
    folder = RunFolder(Path(config.run.output_dir))
    folder.path.mkdir(exist_ok=True)
    train(adapted, data, config, folder, resume_from, objective=ROW_MEAN)
    return folder, {name: tensor.detach().clone() for name, tensor in trainable_state(adapted.model).items()}


def row_mean_of(config: RunConfig, rows: Sequence[Example]) -> float:
    """Return the mean over rows of each row's mean loss, by the model's own forward."""
    model: Any = load_model(config.model, config.quantization).model
    means = []
    for row in rows:
        ids = torch.from_numpy(row.input_ids).long()
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].float()
        nll = functional.cross_entropy(logits, ids[1:], reduction="none")
        means.append(float(nll[torch.from_numpy(row.loss_mask)[1:]].mean()))
    return sum(means) / len(means)


def test_step_averages_over_the_items_of_the_objective(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, *SETTINGS, "train.max_steps=1")
    folder, _ = train_row_means(config)
    rows = prepare_tokenizer_and_data(config, resolve_base(config.model), date=DATE)[0].train
    assert isinstance(rows, Rows)
    line = metrics(folder)[0]
    assert line["loss"] == pytest.approx(row_mean_of(config, rows), rel=1e-5)
    assert line["row_labels"] == pytest.approx(rows.num_labels.sum() / len(rows))
    by_token = rows.num_labels / rows.num_labels.sum()
    assert by_token.max() > 1.2 / len(rows), "rows are too alike to tell the means apart"


def test_own_metrics_are_logged_evaluated_and_resumed_bitwise(pico_llama: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "train.max_steps=4", "train.logging_steps=4", "train.save_steps=3")
    config = make_config(tmp_path, pico_llama, *settings, name="straight")
    straight, expected = train_row_means(config)
    resumed = RunFolder(Path(shutil.copytree(straight.path, tmp_path / "resumed")))
    shutil.rmtree(resumed.checkpoint(4))
    config = make_config(tmp_path, pico_llama, *settings, name="resumed")
    _, actual = train_row_means(config, resumed.checkpoint(3))
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    trained, evaluated = metrics(straight)
    assert trained["row_labels"] > 1
    assert (evaluated["eval_loss"], evaluated["eval_rows"]) == (0.5, NUM_HELD_OUT)
    assert [line.get("row_labels") for line in metrics(resumed)] == [trained["row_labels"], None]
