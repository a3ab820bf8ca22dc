"""Out of memory: probed before step 1, and met by smaller settings with the same result."""

import json
import random
import shutil
import sys
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qlora_train.data.streaming import RowStream
from qlora_train.models import resolve_base
from qlora_train.planning.base_and_data import prepare_tokenizer_and_data
from qlora_train.runs import RunFolder, apply_fitted_settings, read_json, record_fitted_settings
from qlora_train.runs.training_state import random_state
from qlora_train.training import train_loop
from qlora_train.training.batch_source import RowBatches, make_batch_source
from qlora_train.training.memory.memory_probe import probe_memory
from qlora_train.training.memory.worst_case_batch import worst_case_batches
from qlora_train.utils.constants import IGNORE_INDEX
from qlora_train.utils.errors import CheckpointError, is_out_of_memory
from tests.support.memory_limit import WITHOUT_LIMIT, run_limited
from tests.support.runs import adapter_bytes, losses, make_config, train_run, write_rows
from tests.support.stores import example, rows_of
from tests.support.trainers import DATE, trainer_of
from tests.support.unpaired_rows import write_labelled

MB = 1 << 20
SETTINGS = (
    "data.format=text", "data.max_length=1024", "data.train_on=all", "data.num_proc=1", "data.eval=null",
    "quantization.bnb_4bit_compute_dtype=float32", "train.learning_rate=1e-2", "train.gradient_accumulation_steps=1",
    "train.per_device_train_batch_size=4", "train.max_steps=2", "train.logging_steps=1", "run.seed=7",
    "train.adam_epsilon=1e-3",
)  # fmt: skip
"""With a smaller epsilon, Adam amplifies rounding errors of tiny gradients to whole steps."""
SPARE = {"a row": 500 * MB, "a layer": 240 * MB}
"""Memory beyond the model: enough for what all layers save of a row, or for one layer."""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="the address space is limited and measured as on Linux")


# --- the probe preserves the run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("lora.lora_dropout=0.1", "train.neftune_noise_alpha=5"),
        ("lora.lora_dropout=0.1", "train.optim=adamw_8bit", "lora.r=64", "train.gradient_checkpointing=full"),
        ("data.packing=true", "lora.lora_dropout=0.1"),
    ],
    ids=["dropout and NEFTune", "8-bit optimizer and checkpointing", "packs"],
)
def test_memory_probe_changes_no_bit_of_a_run(
    settings: tuple[str, ...], pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (*settings, "train.max_steps=2")
    probed = train_run(tmp_path, pico_llama, *settings, name="probed")
    monkeypatch.setattr(train_loop, "fitting_trainer", lambda make, config, _run: make(config))
    unprobed = train_run(tmp_path, pico_llama, *settings, name="unprobed")
    assert losses(probed) == losses(unprobed)
    assert adapter_bytes(probed) == adapter_bytes(unprobed)


def test_memory_probe_preserves_the_model_state(pico: Callable[..., Path], tmp_path: Path) -> None:
    """Dynamic RoPE forgets the length of the probe."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
    base = pico("llama", max_position_embeddings=32, rope_parameters=rope)
    trainer, _ = trainer_of(make_config(tmp_path, base, "lora.lora_dropout=0.1", "data.max_length=64"))
    model = trainer.accelerator.prepare_model(trainer.model)
    (rotary,) = [module for name, module in model.named_modules() if name.endswith("rotary_emb")]

    def state() -> list[Any]:
        generators = random_state()
        tensors = [*model.parameters(), *model.buffers()]
        return [
            *(tensor.detach().clone() for tensor in tensors), *map(id, tensors),
            generators["torch"], generators["numpy"]["keys"], generators["python"], rotary.max_seq_len_cached,
            [module.training for module in model.modules()], [parameter.grad for parameter in model.parameters()],
        ]  # fmt: skip

    model(input_ids=torch.ones(1, 40, dtype=torch.long))  # the probe's rows are longer
    assert rotary.max_seq_len_cached == 40
    before = state()
    assert probe_memory(trainer).problem is None
    for old, new in zip(before, state(), strict=True):
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit"])
def test_memory_probe_reserves_the_optimizer_state(
    optim: str, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Optimizers keep the state of a trained embedding in 32 bits."""
    settings = ("lora.modules_to_save=[embed_tokens]", f"train.optim={optim}")
    trainer, _ = trainer_of(make_config(tmp_path, pico_llama, *settings))
    reserved: list[int] = []
    empty = torch.empty

    def counting(*shape: Any, **options: Any) -> torch.Tensor:
        if options.get("dtype") is torch.uint8:
            reserved.append(int(shape[0]))
        return empty(*shape, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counting)
        assert probe_memory(trainer).problem is None
    optimizer = trainer.create_optimizer()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = {value.data_ptr(): value for values in optimizer.state.values() for value in values.values()
             if isinstance(value, torch.Tensor) and value.dim()}  # fmt: skip
    tables = {
        tensor.data_ptr() for values in optimizer.state.values() for name, tensor in values.items() if "qmap" in name
    }
    stored = sum(tensor.nbytes for pointer, tensor in state.items() if pointer not in tables)
    assert stored <= reserved[0] <= stored + 2 * 1024 * len(optimizer.state)


# --- the worst case ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        ("train.per_device_train_batch_size=3",),
        ("train.per_device_train_batch_size=1", "train.gradient_accumulation_steps=16"),
        ("train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=5"),
        ("train.per_device_train_batch_size=3", "data.packing=true"),
        ("train.padding_free=false", "train.per_device_train_batch_size=3"),
        ("train.padding_free=false", "train.per_device_train_batch_size=50"),
        ("train.padding_free=false", "train.per_device_train_batch_size=4", "train.group_by_length=true"),
        ("train.padding_free=false", "train.per_device_train_batch_size=3", "data.packing=true"),
        ("train.padding_free=false", "train.per_device_train_batch_size=2", "data.packing=true", "data.train_on=all"),
    ],
    ids=" ".join,
)
def test_no_batch_of_a_run_is_larger_than_the_worst_case(
    settings: tuple[str, ...], pico_llama: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    long_question = [{"role": "user", "content": "1 + " * 20}, {"role": "assistant", "content": "20"}]
    rows.write_text(rows.read_text() + json.dumps({"messages": long_question}) + "\n")  # most tokens, fewest labels
    config = make_config(tmp_path, pico_llama, "data.eval=null", "train.eval_steps=null", *settings)
    trainer, _ = trainer_of(config)
    tried, *others = worst_case_batches(trainer.batch_source, config)
    assert all(other["input_ids"].numel() == tried["input_ids"].numel() for other in others)
    num_documents = max(len(batch["row"]) for batch in (tried, *others))
    steps = trainer.batch_source.steps_per_epoch
    assert steps is not None
    tokens, labels, documents = [], [], []
    for epoch in range(3):
        trainer.state.global_step = epoch * steps
        for batch in chain.from_iterable(trainer.get_train_dataloader()):
            tokens.append(batch["input_ids"].numel())
            labels.append(int((batch["labels"] != IGNORE_INDEX).sum()))
            documents.append(len(batch["row"]))
    num_tried = int((tried["labels"] != IGNORE_INDEX).sum())
    assert tried["input_ids"].numel() >= max(tokens)
    assert num_tried >= max(labels)
    assert num_documents >= max(documents)
    if "train.padding_free=false" in settings:
        assert num_tried <= 1.25 * max(labels)
        assert tried["input_ids"].numel() <= 1.1 * max(tokens)  # and not much larger than necessary


def test_worst_case_of_a_stream_is_full_rows(pico_llama: Path, tmp_path: Path) -> None:
    streamed = ("data.streaming=true", "data.eval=null", "train.eval_steps=null", "train.save_steps=1")
    config = make_config(tmp_path, pico_llama, *streamed, "train.per_device_train_batch_size=3")
    data, _ = prepare_tokenizer_and_data(config, resolve_base(config.model), date=DATE)
    assert isinstance(data.train, RowStream)
    source = make_batch_source(data.train, config, 0, torch.device("cpu"), group_batch_size=3)
    (tried,) = worst_case_batches(source, config)
    assert tried["input_ids"].shape == (3, config.data.max_length)
    share = max(np.count_nonzero(row.loss_mask) / len(row.input_ids) for row in data.train.head())
    num_labels = int((tried["labels"] != IGNORE_INDEX).sum())
    assert share * 3 * config.data.max_length <= num_labels < share * 3 * config.data.max_length + 3


# --- the same result --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_rows", [37, 48])
def test_fitted_batches_group_rows_like_the_original_ones(num_rows: int, pico_llama: Path, tmp_path: Path) -> None:
    lengths = np.random.default_rng(3).integers(5, 99, num_rows)
    rows = rows_of(tmp_path / "rows", [example([1] * length, [1] * length) for length in lengths])

    def steps(batch_size: int, accumulation: int, epoch: int) -> list[list[int]]:
        config = make_config(
            tmp_path, pico_llama, "train.group_by_length=true", f"train.per_device_train_batch_size={batch_size}",
            f"train.gradient_accumulation_steps={accumulation}",
        )  # fmt: skip
        source = make_batch_source(rows, config, 0, torch.device("cpu"), group_batch_size=8)
        assert isinstance(source, RowBatches)
        return [[*chain.from_iterable(step)] for step in source.epoch_steps(epoch)]

    for epoch in range(3):
        assert steps(2, 4, epoch) == steps(8, 1, epoch)


@pytest.mark.parametrize(
    "settings",
    [
        ("train.group_by_length=true",),
        ("data.packing=true", "data.max_length=64"),
        ("train.objective=kto", "data.train={labelled}", "data.max_length=192"),
    ],
)
def test_resuming_with_a_smaller_micro_batch_has_the_same_result(
    settings: tuple[str, ...], pico_llama: Path, tmp_path: Path
) -> None:
    """Resumes inside the second epoch with the recorded settings; the config keeps its own."""
    exact = (
        "quantization.bnb_4bit_compute_dtype=float32",
        "train.auto_find_batch_size=true",
        "train.save_steps=1",
        *(each.format(labelled=write_labelled(tmp_path / "labelled.jsonl")) for each in settings),
    )
    asked = ("train.per_device_train_batch_size=4", "train.max_steps=7")
    whole = train_run(tmp_path, pico_llama, *exact, *asked, name="whole")
    run = RunFolder(tmp_path / "resumed")
    shutil.copytree(whole.path, run.path)
    for later in run.checkpoint_steps()[-3:]:
        shutil.rmtree(run.checkpoint(later))
    shutil.rmtree(run.adapter)
    config = make_config(tmp_path, pico_llama, *exact, *asked, name="resumed")
    smaller = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    record_fitted_settings(run, config.train, config.train.model_copy(update=smaller), "a test")
    train_run(tmp_path, pico_llama, *exact, *asked, name="resumed")
    np.testing.assert_allclose(losses(run), losses(whole), rtol=1e-4)
    for name, wanted in load_file(whole.adapter / "adapter_model.safetensors").items():
        found = load_file(run.adapter / "adapter_model.safetensors")[name]
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    assert json.loads(run.fitted_settings_file.read_text())["applied"] == smaller
    assert "per_device_train_batch_size: 4" in run.config_file.read_text()


def test_fitted_settings_apply_to_the_settings_they_were_recorded_for(pico_llama: Path, tmp_path: Path) -> None:
    asked = make_config(tmp_path, pico_llama, "train.per_device_train_batch_size=4").train
    run = RunFolder(tmp_path)
    assert apply_fitted_settings(run, asked) == asked
    fitted = asked.model_copy(update={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4})
    record_fitted_settings(run, asked, fitted, "a test")
    assert apply_fitted_settings(run, asked) == fitted
    other = asked.model_copy(update={"gradient_accumulation_steps": 3})
    assert apply_fitted_settings(run, other) == other
    free = {"per_device_eval_batch_size": 1}
    assert apply_fitted_settings(run, asked.model_copy(update=free)) == fitted.model_copy(update=free)


@pytest.mark.parametrize("content", ["{", "[]", '{"requested": 3}', '{"requested": {}, "applied": {}}'])
def test_damaged_fitted_settings_are_an_error(content: str, pico_llama: Path, tmp_path: Path) -> None:
    asked, run = make_config(tmp_path, pico_llama).train, RunFolder(tmp_path)
    run.fitted_settings_file.write_text(content)
    if content == "[]":
        assert apply_fitted_settings(run, asked) == asked
        return
    with pytest.raises(CheckpointError, match=r"fit\.json: .* delete"):
        apply_fitted_settings(run, asked)


# --- real out of memory -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arguments(pico: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return the command line without run.output_dir: long rows and wide MLPs."""
    folder = tmp_path_factory.mktemp("out-of-memory")
    words, generator = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog"), random.Random(0)
    rows = [" ".join(generator.choices(words, k=generator.randint(250, 270))) for _ in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    base = pico("llama", max_position_embeddings=1024, num_hidden_layers=8, intermediate_size=4096)
    (folder / "config.yaml").write_text(
        f"model:\n  model_name_or_path: {base}\ndata:\n  train: {folder / 'rows.jsonl'}\n"
    )
    return [str(folder / "config.yaml"), *SETTINGS]


@pytest.fixture(scope="module")
def unlimited(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("unlimited") / "run")
    ended = run_limited(
        [*arguments, f"run.output_dir={run.path}"], run.path.with_suffix(".log"), moment="fitting_trainer",
        spare_bytes=WITHOUT_LIMIT,
    )  # fmt: skip
    assert ended.status == 0, ended.log
    return run


def assert_same_weights(run: RunFolder, wanted: RunFolder) -> None:
    found = load_file(run.adapter / "adapter_model.safetensors")
    for name, tensor in load_file(wanted.adapter / "adapter_model.safetensors").items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4)


@on_linux
def test_batch_that_does_not_fit_is_an_error_with_settings_that_do(arguments: list[str], tmp_path: Path) -> None:
    ended = run_limited(
        [*arguments, f"run.output_dir={tmp_path / 'run'}"], tmp_path / "log", moment="fitting_trainer",
        spare_bytes=SPARE["a row"],
    )  # fmt: skip
    assert ended.status == 2, ended.log
    line = ended.log.splitlines()[-1]
    assert line.startswith("out of memory: training on 4 x ")
    assert "train.per_device_train_batch_size=1 train.gradient_accumulation_steps=4; repeat the command with" in line
    assert "Traceback" not in ended.log
    assert not RunFolder(tmp_path / "run").checkpoint_steps()


@on_linux
@pytest.mark.parametrize(
    ("spare", "applied"),
    [
        ("a row", {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
        (
            "a layer",
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "gradient_checkpointing": "full"},
        ),
    ],
    ids=["a row fits", "a layer fits"],
)  # fmt: skip
def test_auto_find_batch_size_trains_to_the_same_weights(
    spare: str, applied: dict[str, Any], arguments: list[str], unlimited: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    ended = run_limited(
        [*arguments, "train.auto_find_batch_size=true", f"run.output_dir={run.path}"], tmp_path / "log",
        moment="fitting_trainer", spare_bytes=SPARE[spare],
    )  # fmt: skip
    assert ended.status == 0, ended.log
    assert read_json(run.fitted_settings_file)["applied"] == applied
    assert_same_weights(run, unlimited)


@on_linux
def test_out_of_memory_in_mid_run_uses_the_next_fallback_on_repeat(
    arguments: list[str], unlimited: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    typed = [*arguments, "train.per_device_train_batch_size=2", "train.gradient_accumulation_steps=2"]
    typed += ["train.auto_find_batch_size=true", f"run.output_dir={run.path}"]
    ended = run_limited(typed, tmp_path / "log", moment="_run_steps", spare_bytes=SPARE["a row"])
    assert ended.status == 2, ended.log
    line = ended.log.splitlines()[-1]
    assert line.startswith("step 1: out of memory (")
    assert "repeat the command: the run resumes with train.per_device_train_batch_size=1" in line
    ended = run_limited(typed, tmp_path / "log", moment="_run_steps", spare_bytes=SPARE["a row"])
    assert ended.status == 0, ended.log
    assert_same_weights(run, unlimited)


def test_out_of_memory_errors_are_recognised() -> None:
    allocator = "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(allocator))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
