"""The plan of steps on several GPUs, beside bytes counted on real models."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

from memory_plan import memory_plan
from scaling_plan import CLUSTERS, MODELS, FrozenBytes, frozen_bytes, gather_bytes, rank_plan, reduce_bytes

from qlora_train.config import ModelSection, QuantizationSection
from qlora_train.models import LoadedModel, load_model


@pytest.fixture(scope="module")
def loaded(pico_llama: Path) -> LoadedModel:
    return load_model(
        ModelSection(model_name_or_path=str(pico_llama)), QuantizationSection(bnb_4bit_compute_dtype="bfloat16")
    )


def planned(base: Path) -> FrozenBytes:
    """Return the frozen bytes of a base with an output head of its own."""
    config_json = json.loads((base / "config.json").read_text(encoding="utf-8"))
    plan = memory_plan(config_json, r=4, tokens=64)
    root_numel = config_json["hidden_size"] * (2 * config_json["vocab_size"] + 1)
    return frozen_bytes(plan, num_layers=config_json["num_hidden_layers"], root_numel=root_numel)


def test_frozen_bytes_are_those_of_a_loaded_model(loaded: LoadedModel, pico_llama: Path) -> None:
    frozen = planned(pico_llama)
    layers = loaded.model.model.layers
    quantized = [module for module in layers.modules() if isinstance(getattr(module, "weight", None), torch.Tensor)]
    states = [state for module in quantized if (state := getattr(module, "quant_state", None)) is not None]
    counted = sum(parameter.nbytes for parameter in layers.parameters()) + sum(state.absmax.nbytes for state in states)
    assert frozen.num_layers * frozen.layer == counted
    assert frozen.root == sum(parameter.nbytes for parameter in loaded.model.parameters()) - sum(
        parameter.nbytes for parameter in layers.parameters()
    )
    nested = [(state.code, state.offset, state.state2.absmax, state.state2.code) for state in states]
    assert frozen.replicated == sum(tensor.nbytes for tensors in nested for tensor in tensors)


def test_more_ranks_hold_less_and_send_more() -> None:
    frozen = FrozenBytes(layer=100, root=40, replicated=1, num_layers=3)
    sent = [gather_bytes(frozen, num_ranks=ranks, num_micro_batches=5) for ranks in (1, 2, 4)]
    assert sent == [0, 5 * 640 / 2, 5 * 640 * 3 / 4]
    assert [reduce_bytes(8, num_ranks=ranks) for ranks in (1, 2, 4)] == [0, 32, 48]


def test_two_strategies_compute_the_same_and_hold_other_bytes() -> None:
    two_gpus = CLUSTERS[0]
    ddp, fsdp = (rank_plan(MODELS["Llama-2-70B"], two_gpus, strategy) for strategy in ("ddp", "fsdp"))
    assert ddp.compute_seconds == fsdp.compute_seconds
    assert ddp.gather_bytes == ddp.gathered_bytes == 0
    assert fsdp.base_bytes == pytest.approx(ddp.base_bytes / 2, rel=0.01)
    assert fsdp.seconds == max(fsdp.compute_seconds, fsdp.gather_seconds) + fsdp.reduce_seconds
