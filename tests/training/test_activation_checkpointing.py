"""Activation checkpointing: bitwise equal at every level, less memory per level, a plan within its budget."""

import itertools
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from qlora_train.kernels import tiled
from qlora_train.kernels.checkpointing_levels import plan_levels
from qlora_train.kernels.install import install
from qlora_train.objectives.label_losses import label_losses
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.training.memory import memory_probe as trial
from qlora_train.training.memory.activation_checkpointing import (
    LEVELS,
    CheckpointingLevel,
    LayerCheckpointing,
    ignoring_weights,
    saved_bytes,
)
from qlora_train.training.memory.auto_batch_size import relax_checkpointing
from qlora_train.training.memory.memory_probe import forward_worst_case, probe_memory
from qlora_train.training.parity.gradients import compare_gradients, gradients_of
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.utils.errors import ConfigError
from tests.support.runs import adapted_model, adapter_bytes, make_config, train_run

Pico = Callable[..., Path]
IDS = torch.arange(60).reshape(3, 20) * 5 % 300 + 4
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": IDS}
FAMILIES = ("llama", "gemma2", "qwen3", "phi3", "qwen2_moe", "granitemoehybrid", "gpt_neox")


def on_the_fused_kernels(model_type: str, pico: Pico, folder: Path, *settings: str) -> tuple[Any, LayerCheckpointing]:
    adapted = adapted_model(folder, pico(model_type), *settings)
    fast = install(adapted.model, lambda: label_losses(adapted.model, **BATCH))
    return adapted, LayerCheckpointing(adapted.model, fast.mlps)


def bytes_saved(model: Any, run: Callable[[], Any]) -> int:
    """Return the bytes of all that autograd saves, without weights."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with ignoring_weights(model, saved_tensors_hooks(pack, lambda tensor: tensor)):
        _graph = run()
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(storages.values())


@pytest.mark.parametrize(("dtype", "tile_rows"), [("float32", tiled.TILE_ROWS), ("bfloat16", 7)])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_level_has_the_same_bits(
    model_type: str, dtype: str, tile_rows: int, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "TILE_ROWS", tile_rows)
    adapted = adapted_model(tmp_path, pico(model_type), dtype=dtype)
    fast = install(adapted.model, lambda: label_losses(adapted.model, **BATCH))
    layers = LayerCheckpointing(adapted.model, fast.mlps)
    wanted = gradients_of(adapted, BATCH)
    for level in (level for level in LEVELS if layers.supports(level)):
        layers.set(level)
        found = compare_gradients(wanted, gradients_of(adapted, BATCH))
        assert (found.loss, found.gradient) == (0, 0), level
    assert layers.supports("full")
    adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
    layers.leave_to_transformers()
    found = compare_gradients(wanted, gradients_of(adapted, BATCH))
    assert (found.loss, found.gradient) == (0, 0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_each_level_saves_less_and_as_much_as_counted(model_type: str, pico: Pico, tmp_path: Path) -> None:
    adapted, layers = on_the_fused_kernels(model_type, pico, tmp_path)

    def run() -> Any:  # in chunks, whose gradient is made in the forward pass
        return label_losses(adapted.model, 3, **BATCH).nll

    adapted.model.train()
    counted = saved_bytes(adapted.model, layers, run)
    assert layers.levels == ["none"] * len(layers.layers)
    saved = {}
    for level in counted:
        layers.set(level)
        saved[level] = bytes_saved(adapted.model, run)
    for one, other in itertools.pairwise(counted):
        assert all(more >= less for more, less in zip(counted[one], counted[other], strict=True))
        wanted = saved[one] - saved[other]
        assert sum(counted[one]) - sum(counted[other]) == pytest.approx(wanted, rel=0.05)
    assert all(more > less for more, less in zip(counted["none"], counted["full"], strict=True))
    x = IDS.numel() * 64 * 4
    assert all(x <= each <= 3 * x for each in counted["full"])  # the input, and a mask or angles that all layers read


def test_mlp_level_saves_all_but_gate_and_up(pico: Pico, tmp_path: Path) -> None:
    adapted, layers = on_the_fused_kernels("llama", pico, tmp_path)
    adapted.model.train()
    counted = saved_bytes(adapted.model, layers, lambda: label_losses(adapted.model, **BATCH))
    gate_and_up = 2 * IDS.numel() * 128 * 4
    for everything, rest in zip(counted["none"], counted["mlp"], strict=True):
        assert gate_and_up <= everything - rest <= 1.5 * gate_and_up


@pytest.mark.parametrize("level", ["mlp", "full"])
def test_tiles_are_recomputed_once_and_one_at_a_time(
    level: CheckpointingLevel, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiled, "TILE_ROWS", 7)
    adapted, layers = on_the_fused_kernels("llama", pico, tmp_path)
    layers.set(level)
    alive: list[int] = []
    references: list[weakref.ref[Any]] = []
    gate_proj = adapted.model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")
    own = gate_proj.forward

    def counted(x: torch.Tensor) -> torch.Tensor:
        alive.append(sum(reference() is not None for reference in references))
        gate: torch.Tensor = own(x)
        references.append(weakref.ref(gate))
        return gate

    monkeypatch.setattr(gate_proj, "forward", counted)
    label_losses(adapted.model.train(), **BATCH).nll.sum().backward()
    num_tiles = math.ceil(IDS.numel() / 7)
    assert len(alive) == 2 * num_tiles
    assert max(alive) <= 1


KEPT: dict[CheckpointingLevel, list[int]] = {"none": [100] * 6, "mlp": [40] * 6, "full": [10] * 6}
WORK = {"none": 0.0, "mlp": 0.7, "full": 1.0}


@pytest.mark.parametrize("budget", range(0, 601, 45))
def test_plan_is_within_its_budget_and_near_optimal(budget: int) -> None:
    def work(levels: tuple[CheckpointingLevel, ...]) -> float:
        return sum(WORK[level] for level in levels)

    def more(levels: tuple[CheckpointingLevel, ...]) -> int:
        return sum(KEPT[level][0] - 10 for level in levels)

    plan = tuple(plan_levels(KEPT, lambda _, level: WORK[level], budget))
    assert more(plan) <= budget
    best = min(work(each) for each in itertools.combinations_with_replacement(LEVELS, 6) if more(each) <= budget)
    assert work(plan) <= best + 0.31  # half a step of one layer


def test_plan_without_mlp_level_and_with_unequal_layers() -> None:
    kept: dict[CheckpointingLevel, list[int]] = {"none": [30, 20, 90], "full": [1, 1, 1]}
    assert plan_levels(kept, lambda _, level: WORK[level], 50) == ["none", "none", "full"]
    assert plan_levels(kept, lambda _, level: WORK[level], 28) == ["full", "none", "full"]


def test_free_memory_relaxes_checkpointing(pico: Pico, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico("llama"), "train.gradient_checkpointing=full")
    adapted, layers = on_the_fused_kernels("llama", pico, tmp_path)
    folder = RunFolder(Path(config.run.output_dir))
    _, data = prepare(config, folder)
    trainer = QloraTrainer(adapted, data, config, folder, [], layer_checkpointing=layers)
    assert layers.levels == ["full", "full"]
    trial = probe_memory(trainer)
    assert relax_checkpointing(trainer, trial, 0).problem is None
    assert layers.levels == ["full", "full"]
    relax_checkpointing(trainer, trial, 1e12)
    assert layers.levels == ["none", "none"]
    layers.set("full")
    kept = saved_bytes(trainer.model, layers, lambda: forward_worst_case(trainer))
    relax_checkpointing(trainer, trial, sum(kept["none"]) / 2)
    assert layers.levels[-1] == "none"
    assert layers.levels[0] != "none"


@pytest.mark.parametrize("moment", ["counting", "trying"])
def test_out_of_memory_restores_full_checkpointing(
    moment: str, pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The GPU may run out of memory although the plan fits."""
    config = make_config(tmp_path, pico("llama"), "train.gradient_checkpointing=full")
    adapted, layers = on_the_fused_kernels("llama", pico, tmp_path)
    folder = RunFolder(Path(config.run.output_dir))
    trainer = QloraTrainer(adapted, prepare(config, folder)[1], config, folder, [], layer_checkpointing=layers)
    trial = probe_memory(trainer)
    where, name = (trainer, "batch_loss") if moment == "counting" else (trainer.accelerator, "backward")
    own = getattr(where, name)

    def limited(*arguments: Any) -> Any:
        if layers.levels != ["full", "full"]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(*arguments)

    monkeypatch.setattr(where, name, limited)
    monkeypatch.setattr(logging.getLogger("qlora_train"), "propagate", True)
    with caplog.at_level(logging.WARNING, logger="qlora_train"):
        assert relax_checkpointing(trainer, trial, 1e12) is trial
    assert layers.levels == ["full", "full"]
    assert "gradient_checkpointing: full (anything less did not fit: CUDA out of memory)" in caplog.text


def test_relaxed_checkpointing_leaves_room_for_fragmentation(
    pico: Pico, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Any
) -> None:
    """Batches of other lengths fragment the memory later."""
    config = make_config(tmp_path, pico("llama"), "train.gradient_checkpointing=full")
    adapted, layers = on_the_fused_kernels("llama", pico, tmp_path)
    folder = RunFolder(Path(config.run.output_dir))
    trainer = QloraTrainer(adapted, prepare(config, folder)[1], config, folder, [], layer_checkpointing=layers)
    total = 8_000_000_000

    def reserved(_device: Any) -> int:
        return {0: 4, 1: 7, 2: 8}[layers.levels.count("none")] * total // 8

    monkeypatch.setattr(trial, "_peak_bytes", reserved)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (total, total))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: 0)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    kept = saved_bytes(trainer.model, layers, lambda: forward_worst_case(trainer))
    one_layer_at_half = 1.1 * sum(kept["none"])
    relax_checkpointing(trainer, probe_memory(trainer), one_layer_at_half)
    assert layers.levels.count("none") == 1
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:False")
    layers.set("full")
    relax_checkpointing(trainer, probe_memory(trainer), one_layer_at_half)
    assert layers.levels == ["full", "full"]
    assert "0.2 GB short for fragmentation" in messages.text


# --- in a run ---------------------------------------------------------------------------------------------------------


def test_runs_are_bitwise_equal_at_every_level(pico_llama: Path, tmp_path: Path) -> None:
    kept = train_run(tmp_path, pico_llama, "train.max_steps=3", name="kept")
    for level in ("mlp", "full"):
        again = train_run(
            tmp_path, pico_llama, f"train.gradient_checkpointing={level}", "train.max_steps=3", name=level
        )
        assert adapter_bytes(again) == adapter_bytes(kept)


def test_unsupported_levels_are_refused(pico: Pico, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.gradient_checkpointing: full, but Transformers does not support it"):
        train_run(tmp_path, pico("jetmoe"), "train.gradient_checkpointing=full")
    with pytest.raises(ConfigError, match="gradient_checkpointing: mlp, but no MLP of this model has fused kernels"):
        train_run(tmp_path, pico("gpt_neox"), "train.gradient_checkpointing=mlp", name="other")
    with pytest.raises(ConfigError, match=r"gradient_checkpointing=true: .*; allowed: auto, none, mlp or full"):
        make_config(tmp_path, pico("llama"), "train.gradient_checkpointing=true")
