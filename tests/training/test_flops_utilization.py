"""Operations and peaks behind MFU: the benchmarks' formula, experts that a token passes, and data sheets."""

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from count_memory import MODELS
from model_flops import model_shape, step_flops

from qlora_train.config import LoraSection
from qlora_train.planning.model_shape import ModelShape
from qlora_train.planning.run_plan import model_shapes
from qlora_train.training.flops_utilization import ModelFlops, utilization
from qlora_train.training.peak_flops import data_sheet_tflops, peak_flops

RANK, TOKENS, LABELS = 16, 700, 300


def flops_of(shape: ModelShape) -> ModelFlops:
    return ModelFlops.of(
        base_numel=shape.active_numel, adapter_numel=shape.active_adapter_numel(RANK),
        head_numel=shape.vocab_size * shape.hidden_size,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3.1-8b"])
def test_operations_are_those_of_the_benchmarks_without_attention(name: str) -> None:
    config_json: dict[str, Any] = MODELS[name]
    expected = step_flops(model_shape(config_json), r=RANK, row_lengths=[TOKENS], num_labels=LABELS)
    flops = flops_of(model_shapes(config_json, LoraSection(r=RANK)))
    assert flops.per_token * TOKENS == expected.base + expected.adapter
    assert flops.per_label * LABELS == expected.head


def test_a_token_counts_the_experts_that_it_passes() -> None:
    config_json = MODELS["qwen3-30b-a3b, 2 layers"]
    shape = model_shapes(config_json, LoraSection(r=RANK))
    hidden, width, per_token, heads, key_heads, head_dim = 2048, 768, 8, 32, 4, 128
    attention = [(hidden, heads * head_dim), *2 * [(hidden, key_heads * head_dim)], (heads * head_dim, hidden)]
    experts = per_token * [(hidden, 2 * width), (width, hidden)]
    base = 2 * sum(rows * columns for rows, columns in (*attention, *experts))  # routers are no linear layers there
    adapter = 2 * RANK * sum(rows + columns for rows, columns in (*attention, *experts))
    assert shape.active_numel == base
    assert shape.active_adapter_numel(RANK) == adapter


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peak_of_a_gpu_is_that_of_its_data_sheet_or_unknown(name: str, tflops: float | None) -> None:
    assert data_sheet_tflops(name) == tflops


def test_peak_of_a_cpu_is_measured() -> None:
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    a = torch.ones(512, 512)
    started = time.perf_counter()
    for _ in range(8):
        a @ a
    rate = 8 * 2 * 512**3 / (time.perf_counter() - started)
    assert rate / 20 < peak.per_second < 20 * rate, "other programs may slow down either"


def test_without_operations_there_is_no_utilization() -> None:
    assert utilization(None, torch.device("cpu"), torch.float32) is None
