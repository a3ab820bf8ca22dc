"""Reference log-probabilities are computed once, and used again only for the model and rows that they belong to."""

import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load_file, save_file

from qlora_train.adapters import trainable_state
from qlora_train.config import RunConfig
from qlora_train.data.token_store import Rows
from qlora_train.evaluation.objective_table import make_objective
from qlora_train.models import load_model, resolve_base
from qlora_train.objectives.batch_loss import model_inputs
from qlora_train.objectives.label_losses import label_losses
from qlora_train.objectives.reference_logps import sequence_logps
from qlora_train.runs import RunFolder, write_json
from qlora_train.runs.reference_files import FILE
from qlora_train.training.progress import ProgressCallback
from qlora_train.training.qlora_trainer import QloraTrainer
from qlora_train.training.stored_reference import _check_finite, store_reference_logps
from qlora_train.training.train_loop import _make_trainer
from qlora_train.utils import atomic_io, signals
from qlora_train.utils.errors import TrainingError
from tests.support.label_logps import log_probability
from tests.support.preference_oracles import Oracle
from tests.support.preference_pairs import write_pairs
from tests.support.runs import adapter_bytes, check_in_this_process, make_config, metrics, stopped_copy, train_run
from tests.support.stores import example, rows_of
from tests.support.trainers import adapted_and_data, folder_of
from tests.support.unpaired_rows import write_labelled

Pico = Callable[..., Path]
EXACT = "quantization.bnb_4bit_compute_dtype=float32"
ROUNDED = "quantization.bnb_4bit_compute_dtype=bfloat16"
ON_THE_FLY = "train.precompute_ref_log_probs=false"
VARIANTS: dict[str, tuple[str, ...]] = {
    "llama": ("llama",),
    "mixture": ("qwen3_moe",),
    "soft-capped": ("gemma2",),
    "padded": ("llama", "train.padding_free=false"),
    "PEFT's layers": ("llama", "train.fused_kernels=false"),
    "DoRA": ("llama", "lora.use_dora=true"),
    "biases": ("llama", "lora.bias=lora_only"),
    "new token": ("llama", "model.new_tokens=[sum]"),
    "checkpointing": ("llama", "train.gradient_checkpointing=full"),
    "MLPs recomputed": ("llama", "train.gradient_checkpointing=mlp"),
}


def settings_for(folder: Path, *more: str) -> tuple[str, ...]:
    rows = folder / "pairs.jsonl"
    if not rows.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_pairs(rows)
    return (
        f"data.train={rows}", "data.max_length=192", "train.objective=dpo", "quantization.min_quantized_share=0", *more,
    )  # fmt: skip


def config_of(folder: Path, base: Path, *more: str, name: str = "run") -> RunConfig:
    return make_config(folder, base, *settings_for(folder, f"data.cache_dir={folder / 'cache'}", *more), name=name)


def started(config: RunConfig, *, noise: float = 0.0) -> QloraTrainer:
    """Return a trainer as before its first step, with stored values; `noise` is added to its adapter."""
    adapted, data = adapted_and_data(config)
    for parameter in trainable_state(adapted.model).values():
        parameter.data += noise * torch.randn(parameter.shape)
    run = folder_of(config)
    run.path.mkdir(parents=True, exist_ok=True)
    identity = {"base_identity": resolve_base(config.model).identity(), "data_fingerprint": data.fingerprint}
    write_json(run.metadata_file, {"run_id": "1", **identity})
    objective = make_objective(config.train, config.lora, adapted.model)
    trainer = _make_trainer(adapted, data, config, run, ProgressCallback(run, {}), objective, None)
    store_reference_logps(trainer, config, run)
    return trainer


def first_metrics(trainer: QloraTrainer, *, trains: bool = True) -> dict[str, float]:
    """Return the summed metrics of the first micro-batch."""
    batch = next(iter(trainer.get_train_dataloader()))[0]
    trainer.model.train(trains)
    with trainer.compute_loss_context_manager():
        loss = trainer.batch_loss(trainer.accelerator.prepare_model(trainer.model), batch)
    return {name: float(value) for name, value in loss.metrics.items()}


def origin(caplog: pytest.LogCaptureFixture) -> str:
    """Return where the values of the last run came from, as logged."""
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("reference: ")]
    return lines[-1].rpartition("(")[2].removesuffix(")")


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)


# --- the values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_first_rewards_are_exactly_zero_in_bfloat16(name: str, pico: Pico, tmp_path: Path) -> None:
    family, *settings = VARIANTS[name]
    trainer = started(config_of(tmp_path, pico(family), ROUNDED, *settings))
    found = first_metrics(trainer)
    assert (found["rewards/chosen"], found["rewards/rejected"], found["rewards/margins"]) == (0, 0, 0)
    assert found["logps/chosen"] < -1


@pytest.mark.parametrize("objective", ["kto", "apo_zero_unpaired"])
def test_first_rewards_of_unpaired_answers_are_zero_too(objective: str, pico_llama: Path, tmp_path: Path) -> None:
    rows = write_labelled(tmp_path / "labelled.jsonl")
    settings = (f"data.train={rows}", f"train.objective={objective}")
    trainer = started(config_of(tmp_path, pico_llama, ROUNDED, *settings))
    rows_of_run = trainer.examples.train
    assert isinstance(rows_of_run, Rows)
    assert rows_of_run.reference_logps is not None
    assert rows_of_run.reference_logps.shape == (len(rows_of_run), 1)
    batch = next(iter(trainer.get_train_dataloader()))[0]
    trainer.model.train()
    inputs: Any = model_inputs(batch)
    with trainer.compute_loss_context_manager():
        model = trainer.accelerator.prepare_model(trainer.model)
        nll = label_losses(model, trainer.loss_chunk_tokens, **inputs).nll
    assert torch.equal(sequence_logps(nll, batch), batch["reference_logps"])


def test_values_are_those_of_transformers_and_trl_on_the_base(pico_llama: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path, pico_llama, EXACT, "train.max_steps=null")
    trainer = started(config)
    data, base = trainer.examples, load_model(config.model, config.quantization)
    assert isinstance(data.train, Rows)
    for rows in (data.train, data.eval):
        expected = [[log_probability(base.model, each) for each in row.sequences] for row in rows]
        assert rows.reference_logps is not None
        np.testing.assert_allclose(rows.reference_logps, expected, rtol=1e-5)
    pairs = list(data.train)
    oracle: Any = Oracle.dpo(trainer.adapted, base.model, pairs, tmp_path / "trl").trainer
    stored = oracle._precompute_ref_logps(oracle.train_dataset, "train", 4)
    actual = np.array([stored["ref_chosen_logps"], stored["ref_rejected_logps"]]).T
    np.testing.assert_allclose(data.train.reference_logps, actual, rtol=1e-5)


def test_a_model_that_does_not_begin_as_its_reference_computes_values_on_the_fly(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tmp_path, pico_llama, EXACT)
    trainer = started(config, noise=0.1)
    differs, follows = [each.getMessage() for each in caplog.records if each.levelname == "WARNING"]
    assert differs.startswith("reference: log-probabilities of the model as it is differ by")
    assert differs.endswith("nats per token from a reference pass: not used")
    assert follows == "reference: log-probabilities are computed for each micro-batch"
    assert not folder_of(config).reference_logps.exists()
    assert not any((tmp_path / "cache").glob("*/" + FILE))
    assert abs(first_metrics(trainer)["rewards/chosen"]) > 0.1


def test_dropout_and_noise_are_not_those_of_the_reference(pico_llama: Path, tmp_path: Path) -> None:
    quiet, noisy = (
        started(config_of(tmp_path / name, pico_llama, EXACT, *more))
        for name, *more in (
            ("quiet",), ("noisy", "train.neftune_noise_alpha=50", "lora.lora_dropout=0.5", "train.padding_free=false"),
        )
    )  # fmt: skip
    values = [trainer.examples.train.reference_logps for trainer in (quiet, noisy)]  # type: ignore[union-attr]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_only_rows_that_are_trained_have_values(pico_llama: Path, tmp_path: Path) -> None:
    trainer = started(config_of(tmp_path, pico_llama, EXACT, "train.max_steps=2"))
    source, rows = trainer.batch_source, trainer.examples.train
    assert isinstance(rows, Rows)
    trained = [row for step, _ in zip(source.epoch_steps(0), range(2), strict=False) for each in step for row in each]
    has_values = np.isfinite(rows.reference_logps).all(axis=1)  # type: ignore[arg-type]
    assert sorted(trained) == np.flatnonzero(has_values).tolist()
    assert 0 < len(trained) < len(rows)
    assert np.isfinite(trainer.examples.eval.reference_logps).all()


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stored")


@pytest.fixture(scope="module", autouse=True)
def checks_here() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        check_in_this_process(patch)
        yield


def run_settings(folder: Path, *more: str) -> tuple[str, ...]:
    cache = f"data.cache_dir={folder / 'cache'}"
    return settings_for(folder, EXACT, "train.save_steps=4", "run.row_losses=8", cache, *more)


@pytest.fixture(scope="module")
def trained(folder: Path, pico_llama: Path) -> RunFolder:
    return train_run(folder, pico_llama, *run_settings(folder), name="trained")


def test_training_is_that_with_values_on_the_fly(trained: RunFolder, folder: Path, pico_llama: Path) -> None:
    run = train_run(folder, pico_llama, *run_settings(folder, ON_THE_FLY), name="on_the_fly")
    assert not run.reference_logps.exists()
    for name in ("loss", "grad_norm", "rewards/margins", "eval_loss", "eval_rewards/chosen"):
        actual, expected = ([line[name] for line in metrics(each) if name in line] for each in (trained, run))
        assert len(expected) > 0
        assert actual == pytest.approx(expected, rel=1e-4, abs=1e-6), name
    first = [metrics(each)[0]["loss"] for each in (trained, run)]
    assert first == pytest.approx([np.log(2)] * 2, abs=1e-6)


def resumed(trained: RunFolder, folder: Path, base: Path, name: str, damage: Callable[[Path], None]) -> RunFolder:
    """Resume a copy as of a stop, with damaged values and an empty cache."""
    copy = stopped_copy(trained, folder / name)
    damage(copy.reference_logps)
    shutil.rmtree(folder / "cache")
    return train_run(folder, base, *run_settings(folder), name=name)


def test_a_resumed_run_uses_its_own_values(
    trained: RunFolder, folder: Path, pico_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = resumed(trained, folder, pico_llama, "resumed", lambda _: None)
    assert origin(caplog) == "stored by this run"
    assert adapter_bytes(run) == adapter_bytes(trained)
    assert metrics(run)[-1]["eval_loss"] == metrics(trained)[-1]["eval_loss"]


def _truncate(values: Path) -> None:
    file = values / FILE
    file.write_bytes(file.read_bytes()[:-8])


def _edited(change: Callable[[np.ndarray], Any]) -> Callable[[Path], None]:
    def damage(values: Path) -> None:
        arrays = load_file(values / FILE)
        arrays["train"] = np.ascontiguousarray(change(arrays["train"].copy()))
        metadata = atomic_io.read_metadata(values)
        save_file(arrays, values / FILE)
        atomic_io.write_manifest(values, metadata)

    return damage


def _not_finite(train: np.ndarray) -> np.ndarray:
    train[3, 1] = np.nan
    return train


def _of_another_base(values: Path) -> None:
    atomic_io.write_manifest(values, {**atomic_io.read_metadata(values), "base": "another", "compute dtype": "float16"})


def _unreadable(values: Path) -> None:
    metadata, file = atomic_io.read_metadata(values), values / FILE
    file.write_bytes(b"")
    atomic_io.write_manifest(values, metadata)
    file.unlink()
    file.symlink_to("/proc/self/mem")  # an empty file whose reads fail, also for root


def _no_safetensors(values: Path) -> None:
    metadata = atomic_io.read_metadata(values)
    (values / FILE).write_bytes(b"{}")
    atomic_io.write_manifest(values, metadata)


@pytest.fixture(scope="module")
def stored_once(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run before its first step, and of its cache; tests use copies."""
    folder = tmp_path_factory.mktemp("stored_once")
    started(config_of(folder, pico_llama, ROUNDED, name="one"))
    return folder


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "logps.safetensors has"),
    "edited": (lambda values: (values / FILE).write_bytes((values / FILE).read_bytes()[::-1]), "has changed since"),
    "without a manifest": (lambda values: (values / "manifest.json").unlink(), "manifest.json is missing"),
    "not finite": (_edited(_not_finite), "some rows have no value"),
    "a row less": (_edited(lambda train: train[1:]), r"logps.safetensors is \(\d+, 2\)"),
    "float64": (_edited(lambda train: train.astype(np.float64)), "float64"),
    "of another base": (_of_another_base, "computed with another base, compute dtype"),
    "unreadable": (_unreadable, r"logps.safetensors cannot be read \(Input/output error\)"),
    "no safetensors": (_no_safetensors, "cannot be read"),
    "moved by a nat per token": (_edited(lambda train: train - 30), "differ by .* nats per token"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_values_are_computed_again(
    name: str, stored_once: Path, tmp_path: Path, pico_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage, message = DAMAGES[name]
    shutil.copytree(stored_once, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "cache")
    config = config_of(tmp_path, pico_llama, ROUNDED, name="one")
    values = folder_of(config).reference_logps
    before, expected = (values / FILE).read_bytes(), load_file(values / FILE)
    damage(values)
    again = started(config).examples
    [warning] = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert re.search(message, warning)
    assert origin(caplog) == "stored"
    assert (values / FILE).read_bytes() == before
    assert np.array_equal(again.eval.reference_logps, expected["eval"])


# --- later runs -------------------------------------------------------------------------------------------------------


def test_a_later_run_of_the_same_base_and_rows_computes_nothing(
    stored_once: Path, pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stored_once, tmp_path, dirs_exist_ok=True)
    [cached] = [file.parent for file in (tmp_path / "cache").glob(f"*/{FILE}")]
    os.utime(cached, (0, 0))
    others = ("train.beta=0.7", "train.learning_rate=1e-5", "train.objective=ipo")
    trainer = started(config_of(tmp_path, pico_llama, ROUNDED, *others, name="two"))
    assert origin(caplog) == "stored by an earlier run"
    assert cached.stat().st_mtime > 0, "the cache deletes the least recently used"
    assert first_metrics(trainer)["rewards/margins"] == 0
    assert np.array_equal(trainer.examples.train.reference_logps, load_file(cached / FILE)["train"], equal_nan=True)  # type: ignore[union-attr]


def _other_weights(base: Path, copy: Path) -> Path:
    """Copy a base with other weights of its head."""
    shutil.copytree(base, copy)
    file = copy / "model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["lm_head.weight"] = weights["lm_head.weight"] * 1.25
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    return copy


OTHERS: dict[str, Callable[[Path, Path], tuple[Path, tuple[str, ...]]]] = {
    "base": lambda base, folder: (_other_weights(base, folder / "other"), (ROUNDED,)),
    "compute dtype": lambda base, _: (base, (EXACT,)),
    "quantization": lambda base, _: (base, (ROUNDED, "quantization.bnb_4bit_quant_type=fp4")),
    "rows": lambda base, folder: (base, (ROUNDED, f"data.train={write_pairs(folder / 'other.jsonl', seed=1)}")),
    "kernels": lambda base, _: (base, (ROUNDED, "train.fused_kernels=false")),
    "seed": lambda base, _: (base, (ROUNDED, "run.seed=8")),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_run_with_another_reference_computes_its_own_values(
    name: str, stored_once: Path, pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(stored_once, tmp_path, dirs_exist_ok=True)
    base, settings = OTHERS[name](pico_llama, tmp_path)
    trainer = started(config_of(tmp_path, base, *settings, name="two"))
    assert origin(caplog) == "stored"
    assert first_metrics(trainer)["rewards/margins"] == 0


def test_a_changed_adapter_to_start_from_is_another_reference(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = tmp_path / "adapter"
    config = config_of(tmp_path, pico_llama, ROUNDED, "train.objective=dpo", name="first")
    adapted, _ = adapted_and_data(config)
    for scale in (1.0, 2.0):
        for name, parameter in adapted.model.named_parameters():
            if "lora_B" in name:
                parameter.data = scale * 0.01 * torch.ones_like(parameter)
        adapted.model.save_pretrained(str(adapter), save_embedding_layers=False)
        trainer = started(
            config_of(tmp_path, pico_llama, ROUNDED, f"lora.adapter_path={adapter}", name=f"run-{scale:g}")
        )
        assert origin(caplog) == "stored"
        assert first_metrics(trainer)["rewards/margins"] == 0
    again = config_of(tmp_path, pico_llama, ROUNDED, f"lora.adapter_path={adapter}", name="again")
    started(again)
    assert origin(caplog) == "stored by an earlier run"


def test_weights_that_no_fingerprint_sees_are_noticed(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qlora_train.models.base_source.BaseSource.identity", lambda _: "the same")
    started(config_of(tmp_path, pico_llama, ROUNDED, name="one"))
    trainer = started(config_of(tmp_path, _other_weights(pico_llama, tmp_path / "other"), ROUNDED, name="two"))
    assert "log-probabilities stored by an earlier run differ by" in caplog.text
    assert origin(caplog) == "stored"
    assert first_metrics(trainer)["rewards/margins"] == 0


# --- stops ------------------------------------------------------------------------------------------------------------


def test_a_stop_while_computing_stores_nothing(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, pico_llama, EXACT)
    monkeypatch.setattr(signals._process, "requested", signals.Stop("SIGTERM", 143))
    with pytest.raises(signals.Stop):
        started(config)
    assert not folder_of(config).reference_logps.exists()
    monkeypatch.undo()
    found = started(config)
    assert first_metrics(found)["rewards/margins"] == pytest.approx(0, abs=1e-6)


def test_a_value_that_is_not_finite_names_its_row(tmp_path: Path) -> None:
    rows = rows_of(tmp_path / "store", [example([5, 6], [0, 1])] * 5)
    values = np.zeros((len(rows), 2), np.float32)
    values[4, 1] = np.inf
    _check_finite(values, rows, np.arange(4))
    with pytest.raises(TrainingError, match=f"{rows[4].where}: its log-probability under the reference model"):
        _check_finite(values, rows, np.arange(len(rows)))
