"""The plan of steps on several GPUs, beside bytes counted on real models."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))  # scripts import their neighbours

import rehearse
from scaling_plan import (
    CLUSTERS,
    GIB,
    MODELS,
    RESERVED_BYTES,
    ROW_STEP,
    gather_bytes,
    longest_row,
    rank_plan,
    reduce_bytes,
)

from qlora_train.config import LoraSection, ModelSection, QuantizationSection
from qlora_train.kernels.checkpointing_levels import CheckpointingLevel
from qlora_train.models import LoadedModel, load_model
from qlora_train.planning.run_plan import model_shapes
from qlora_train.planning.shard_bytes import FrozenBytes, frozen_bytes
from tests.support.counted_collectives import gathered_bytes, summed_bytes
from tests.support.runs import make_config
from tests.support.workers import run_workers

Pico = Callable[..., Path]


@pytest.fixture(scope="module")
def loaded(pico_llama: Path) -> LoadedModel:
    return load_model(
        ModelSection(model_name_or_path=str(pico_llama)), QuantizationSection(bnb_4bit_compute_dtype="bfloat16")
    )


def planned(base: Path) -> FrozenBytes:
    """Return the frozen bytes of a base with an output head of its own."""
    config_json = json.loads((base / "config.json").read_text(encoding="utf-8"))
    return frozen_bytes(model_shapes(config_json, LoraSection()))


def test_frozen_bytes_are_those_of_a_loaded_model(loaded: LoadedModel, pico_llama: Path) -> None:
    frozen = planned(pico_llama)
    packed = [parameter for parameter in loaded.model.parameters() if parameter.dtype == torch.uint8]
    states = [module.quant_state for module in loaded.model.modules() if hasattr(module, "quant_state")]
    assert frozen.num_layers * frozen.layer == sum(tensor.nbytes for tensor in (*packed, *(s.absmax for s in states)))
    matrices = [parameter for parameter in loaded.model.parameters() if parameter.dtype != torch.uint8]
    assert frozen.root == sum(parameter.nbytes for parameter in matrices if parameter.ndim == 2)
    tables = [tensor for s in states for tensor in (s.code, s.offset, s.state2.absmax, s.state2.code)]
    norms = [parameter for parameter in matrices if parameter.ndim == 1]
    assert frozen.replicated == sum(tensor.nbytes for tensor in (*tables, *norms))


@pytest.mark.parametrize("level", ["none", "full"])
def test_planned_gathers_are_those_of_real_micro_batches(
    level: CheckpointingLevel, pico_llama: Path, tmp_path: Path
) -> None:
    frozen = planned(pico_llama)
    in_float32 = replace(frozen, root=2 * frozen.root)
    (tmp_path / "meeting").mkdir()
    counted = run_workers(gathered_bytes, 2, tmp_path / "meeting", tmp_path, pico_llama, level, 3)
    planned_bytes = gather_bytes(in_float32, num_ranks=2, num_micro_batches=3)
    assert [gathered / 2 for gathered in counted] == [planned_bytes, planned_bytes]


def test_the_reference_pass_of_preference_training_gathers_every_layer_once_more(
    pico_llama: Path, tmp_path: Path
) -> None:
    frozen = planned(pico_llama)
    (tmp_path / "meeting").mkdir()
    counted = run_workers(gathered_bytes, 2, tmp_path / "meeting", tmp_path, pico_llama, "none", 3, "dpo")
    assert counted == [3 * (3 * frozen.num_layers * frozen.layer + 2 * frozen.root)] * 2  # the root is in float32


def test_planned_sums_are_those_of_a_real_step(pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, "train.max_steps=2")
    (tmp_path / "meeting").mkdir()
    for summed, adapter_numel in run_workers(summed_bytes, 2, tmp_path / "meeting", config, 2):
        sent = 2 * summed / 2  # by a ring of two
        # beside the gradients: the loss, and which parameters have a gradient
        assert reduce_bytes(adapter_numel, num_ranks=2) <= sent <= 1.01 * reduce_bytes(adapter_numel, num_ranks=2)


def test_rehearsal_counts_the_planned_bytes(pico_llama: Path, tmp_path: Path) -> None:
    rows = ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=8")
    config = make_config(tmp_path, pico_llama, "data.max_length=64", *rows)
    config_json = json.loads((pico_llama / "config.json").read_text(encoding="utf-8"))
    frozen = planned(pico_llama)
    with rehearse.fake_ranks(4):
        ddp, fsdp = (
            rehearse.count_at_full_depth(config, config_json, strategy, rows=1, num_micro_batches=2)
            for strategy in rehearse.STRATEGIES
        )
    assert ddp.gathered == 0
    assert fsdp.gathered * 3 / 4 == gather_bytes(frozen, num_ranks=4, num_micro_batches=1)
    assert ddp.weights - fsdp.weights == frozen.sharded * 3 / 4
    assert fsdp.peak > fsdp.weights + frozen.root + frozen.layer, "the root and a layer are whole at the peak"
    assert fsdp.adapter_numel == ddp.adapter_numel > 0


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("mixtral", "train.objective=sft", "experts are not counted; give the config of a dense model"),
        ("llama", "train.objective=ipo", "counts steps of sft, and train.objective is ipo; add train.objective=sft"),
    ],
)
def test_rehearsal_refuses_what_it_does_not_count_in_one_line(
    family: str, setting: str, message: str, pico: Pico, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, file = pico(family), tmp_path / "run.yaml"
    file.write_text(f"model: {{model_name_or_path: {base}}}\ndata: {{train: rows.jsonl}}\n", encoding="utf-8")
    capsys.readouterr()
    assert rehearse.main([str(file), setting, "--gpus", "2"]) == 2
    assert capsys.readouterr().err == f"rehearse: {message}\n"


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


def test_longest_row_fits_and_the_next_one_does_not() -> None:
    config_json, two_gpus = MODELS["Llama-2-70B"], CLUSTERS[0]
    assert longest_row(config_json, two_gpus, "ddp") == 0
    longest = longest_row(config_json, two_gpus, "fsdp")
    peaks = [rank_plan(config_json, two_gpus, "fsdp", tokens).total_bytes for tokens in (longest, longest + ROW_STEP)]
    assert peaks[0] <= two_gpus.gpu_gib * GIB - RESERVED_BYTES < peaks[1]
