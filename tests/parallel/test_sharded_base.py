"""A base that FSDP shards holds the bytes of a whole one, a part of them per rank, and computes the same gradients.

`QLORA_ARCHITECTURES=long` compares every family of the table.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_train.architectures import ARCHITECTURES
from qlora_train.models.shard_base import check_torch
from qlora_train.utils.errors import ConfigError
from tests.support.sharded_models import (
    compare_adapters,
    compare_families,
    evaluate_with_too_little_memory,
    flip_a_byte,
)
from tests.support.workers import run_workers

Pico = Callable[..., Path]
FAMILIES = ("llama", "gemma3_text", "phi3", "gpt2", "falcon_h1", "qwen3", "mixtral", "qwen3_moe", "gpt_oss", "jetmoe")
"""Tied and transposed weights, a recurrent family; experts stored one by one, as a stack, and outside the interface."""
GROUPS = [(2, FAMILIES), (3, FAMILIES[::3]), (4, FAMILIES)]
"""Numbers of processes, and the families that they load; 3 divides no weight."""
if os.environ.get("QLORA_ARCHITECTURES") == "long":
    every_family = sorted(ARCHITECTURES)
    GROUPS = [(2 + begin % 3, tuple(every_family[begin : begin + 10])) for begin in range(0, len(every_family), 10)]
Found = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=GROUPS, ids=lambda group: f"{group[0]}-{group[1][0]}")
def found(request: pytest.FixtureRequest, pico: Pico, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Found]:
    """Return the number of ranks, and what each of them found."""
    world_size, families = request.param
    folder = tmp_path_factory.mktemp("ranks")
    bases = {name: pico(name) for name in families}
    return world_size, run_workers(compare_families, world_size, folder, bases, folder)


def test_gathered_bytes_equal_those_of_one_process(found: tuple[int, Found]) -> None:
    _, ranks = found
    for families in ranks:
        for family, result in families.items():
            assert result["num_tensors"] > 10, family
            assert result["different"] == [], family
            assert result["summary"], family
            assert result["parameters"], family


def test_each_rank_holds_its_share_of_4_bit_weights(found: tuple[int, Found]) -> None:
    world_size, ranks = found
    for family in ranks[0]:
        shares = [families[family]["share"] for families in ranks]
        assert max(shares) <= 1 / world_size + 0.03, (family, shares)
        assert sum(shares) >= 1, (family, shares)
        assert max(families[family]["held"] for families in ranks) < 0.85, "embeddings are sharded too"


def test_gradients_equal_those_of_one_process(found: tuple[int, Found]) -> None:
    _, ranks = found
    for families in ranks:
        for family, result in families.items():
            assert result["kernels"], family
            assert result["chunked"], family
            assert {"reference", "fused", "none"} <= result.keys(), family
            for way in ("reference", "fused", "none", "mlp", "full"):  # without a level that it does not support
                assert result.get(way, (0, 0, 0)) == (0, 0, 0), f"{family}: {way}"


TRAINS = (
    "model.new_tokens=[<new>]",
    "lora.modules_to_save=[lm_head]",
    "lora.modules_to_save=[input_layernorm] lora.bias=all",
    "lora.lora_dropout=0.1 lora.use_rslora=true",
    "quantization.bnb_4bit_use_double_quant=false",
    "quantization.bnb_4bit_quant_type=fp4",
)
REFUSED = {
    "lora.use_dora=true": "lora.use_dora: true reads whole weights",
    "quantization.load_in_4bit=false": "parallel.strategy: fsdp shards 4-bit weights",
}


def test_adapters_of_all_kinds_train_alike_or_are_refused_in_one_line(pico: Pico, tmp_path: Path) -> None:
    for results in run_workers(compare_adapters, 2, tmp_path, pico("llama"), tmp_path, (*TRAINS, *REFUSED)):
        assert {setting: results[setting] for setting in TRAINS} == dict.fromkeys(TRAINS, (0, 0, 0))
        for setting, message in REFUSED.items():
            assert results[setting].startswith(message)
            assert "\n" not in results[setting]


def test_one_flipped_byte_stops_every_rank(pico: Pico, tmp_path: Path) -> None:
    for intact, flipped in run_workers(flip_a_byte, 3, tmp_path, pico("llama"), tmp_path):
        assert intact == "passed"
        assert flipped.startswith(
            "parallel.strategy: fsdp would train on corrupt weights: model.layers.1.mlp.down_proj"
        )
        assert ": rank 0 gathers other bytes than rank 2 loaded" in flipped
        assert "\n" not in flipped


def test_evaluation_without_memory_on_one_rank_ends_instead_of_a_hang(pico: Pico, tmp_path: Path) -> None:
    first, second = run_workers(evaluate_with_too_little_memory, 2, tmp_path, pico("llama"), tmp_path)
    assert "Connection closed by peer" in first
    assert second == (
        "out of memory: 2 x 20 tokens do not fit (CUDA out of memory); lower train.per_device_eval_batch_size "
        "(parallel.strategy: fsdp cannot retry)"
    )


def test_torch_that_cannot_shard_uint8_is_refused() -> None:
    for version in ("2.12.0", "2.13.0+cu129", "3.0.1"):
        check_torch(version)
    with pytest.raises(ConfigError, match=r"shards uint8 weights, which torch 2\.11\.1 cannot; upgrade torch to 2\.12"):
        check_torch("2.11.1")
