"""Non-finite numbers never reach the weights; skipped steps, overflows and loss spikes are counted."""

import itertools
import json
import logging
import math
import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from qlora_train.adapters import attach_adapter, trainable_state
from qlora_train.config import RunConfig
from qlora_train.config.schema import TrainSection
from qlora_train.models import load_model
from qlora_train.planning.base_and_data import prepare
from qlora_train.runs import RunFolder
from qlora_train.runs.training_state import load_tree
from qlora_train.training import QloraTrainer
from qlora_train.training.loss_spikes import MIN_STEPS, WINDOW_STEPS, LossSpikeDetector, Spike
from qlora_train.training.step_guard import MAX_SCALER_SKIPS, NonFiniteGuard, Step
from qlora_train.utils.errors import ConfigError, TrainingError
from tests.support import trainers
from tests.support.preference_pairs import write_pairs
from tests.support.runs import make_config, train_run

NAN, INF = float("nan"), float("inf")
EVERY_STEP = ("train.save_steps=1", "data.eval=null", "train.eval_steps=null")
SKIP = (*EVERY_STEP, "train.on_nonfinite=skip")
Spoil = Callable[[QloraTrainer, int, float], None]


def trainer_of(config: RunConfig, callbacks: Any = ()) -> QloraTrainer:
    """Return the trainer that a run of this config has, on a model of its own."""
    folder = RunFolder(Path(str(config.run.output_dir)))
    source, data = prepare(config, folder)
    adapted = attach_adapter(load_model(config.model, config.quantization, source=source), config.lora, seed=7)
    return QloraTrainer(adapted, data, config, folder, list(callbacks))


def resumed(config: RunConfig, step: int | None = None) -> QloraTrainer:
    """Return a new trainer resumed from a checkpoint, by default the latest, and trained to the end."""
    trainer = trainer_of(config)
    checkpoint = trainer.run.latest_checkpoint() if step is None else trainer.run.checkpoint(step)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def weights(trainer: QloraTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in trainable_state(trainer.model).items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def spoil_loss(trainer: QloraTrainer, step: int, value: float) -> None:
    """Multiply the logits of one step by `value`."""

    def hook(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * value if trainer.state.global_step == step - 1 else logits

    trainer.model.get_output_embeddings().register_forward_hook(hook)


def spoil_gradient(trainer: QloraTrainer, step: int, value: float) -> None:
    """Set one element of one gradient to `value` in one step."""
    weight = list(trainable_state(trainer.model).values())[5]

    def hook(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.state.global_step == step - 1:
            gradient = gradient.clone()
            gradient.view(-1)[17] = value
        return gradient

    weight.register_hook(hook)


class Spoiler(TrainerCallback):
    """Calls a function before or after one step."""

    def __init__(self, step: int, spoil: Callable[[], None], *, after: bool = False) -> None:
        self._step, self._spoil, self._after = step, spoil, after

    def on_step_begin(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        if not self._after and state.global_step == self._step - 1:
            self._spoil()

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        if self._after and state.global_step == self._step:
            self._spoil()


def spoiling_weight(trainer: QloraTrainer, step: int, value: float, *, after: bool = False) -> Spoiler:
    """Set one element of one weight to `value`."""

    def write() -> None:
        list(trainable_state(trainer.model).values())[4].data.view(-1)[11] = value

    return Spoiler(step, write, after=after)


def spoil_weight(trainer: QloraTrainer, step: int, value: float) -> None:
    trainer.add_callback(spoiling_weight(trainer, step, value))


TARGETS: dict[str, Spoil] = {"loss": spoil_loss, "gradient": spoil_gradient, "weight": spoil_weight}
CELLS = [
    (name, value, 2 + index % 5) for index, (name, value) in enumerate(itertools.product(TARGETS, (NAN, INF, -INF)))
]


@pytest.fixture(scope="module")
def undisturbed(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> QloraTrainer:
    """A trainer after six undisturbed steps."""
    trainer = trainer_of(make_config(tmp_path_factory.mktemp("undisturbed"), pico_llama, *EVERY_STEP))
    trainer.train()
    return trainer


@pytest.mark.parametrize(("target", "value", "step"), CELLS)
def test_non_finite_number_stops_the_run_before_the_update_and_it_resumes_bitwise(
    target: str, value: float, step: int, undisturbed: QloraTrainer, pico_llama: Path, tmp_path: Path
) -> None:
    config = make_config(tmp_path, pico_llama, *EVERY_STEP)
    trainer = trainer_of(config)
    TARGETS[target](trainer, step, value)
    with pytest.raises(TrainingError, match=rf"^step {step}: .*; nothing was updated; rows of this step: \S+:\d+"):
        trainer.train()
    assert trainer.run.checkpoint_steps() == list(range(1, step))
    found, kept = weights(trainer), load_tree(trainer.run.checkpoint(step - 1), "adapter")
    if target == "weight":
        name = list(found)[4]
        assert not torch.isfinite(found[name].view(-1)[11])
        found[name].view(-1)[11] = kept[name].view(-1)[11]
    assert equal(found, kept)
    again = resumed(config)
    assert equal(weights(again), weights(undisturbed))
    assert again.guard.state() == undisturbed.guard.state()
    for name in ("adapter.safetensors", "optimizer.safetensors", "random.safetensors"):
        last = [each.run.checkpoint(6) / name for each in (again, undisturbed)]
        assert last[0].read_bytes() == last[1].read_bytes()


def test_run_that_stopped_may_skip_the_step_when_it_resumes(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = QloraTrainer.get_train_dataloader

    def spoilt(self: QloraTrainer) -> Any:
        spoil_gradient(self, 4, NAN)
        return original(self)

    monkeypatch.setattr(QloraTrainer, "get_train_dataloader", spoilt)
    with pytest.raises(TrainingError, match=r"with train\.on_nonfinite=skip past such steps"):
        train_run(tmp_path, pico_llama, *EVERY_STEP)
    went_on = train_run(tmp_path, pico_llama, *SKIP)
    skipping = train_run(tmp_path, pico_llama, *SKIP, name="skipping")
    files = [run.adapter / "adapter_model.safetensors" for run in (went_on, skipping)]
    assert files[0].read_bytes() == files[1].read_bytes()
    for run in (went_on, skipping):
        assert run.read_results()["training"]["num_skipped_steps"] == 1


OPTIMIZERS = ("adamw_torch", "adamw_8bit", "paged_adamw_8bit", "sgd", "adafactor", "lion_8bit")


@pytest.mark.parametrize(("step", "optimizer"), [(1, "adamw_8bit"), *((3, name) for name in OPTIMIZERS)])
def test_skipped_step_changes_neither_weights_nor_optimizer_state(
    step: int, optimizer: str, pico_llama: Path, tmp_path: Path
) -> None:
    trainer = trainer_of(
        make_config(
            tmp_path, pico_llama, *SKIP, "lora.r=64", f"train.optim={optimizer}", "train.weight_decay=0.5",
            "train.warmup_ratio=0", "train.max_steps=4",
        )
    )  # fmt: skip
    before = weights(trainer)
    spoil_gradient(trainer, step, INF)
    trainer.train()

    def state_after(number: int) -> tuple[dict[str, torch.Tensor], bytes, Any]:
        if number == 0:
            return before, b"", {}
        folder = trainer.run.checkpoint(number)
        moments = load_tree(folder, "optimizer")["state"]
        return load_tree(folder, "adapter"), (folder / "optimizer.safetensors").read_bytes(), repr(moments)

    skipped, earlier, later = state_after(step), state_after(step - 1), state_after(step + 1)
    assert equal(skipped[0], earlier[0])
    assert not equal(skipped[0], later[0])
    if step > 1:
        assert skipped[1:] == earlier[1:]
        if "8bit" in optimizer:
            stored = load_file(trainer.run.checkpoint(step) / "optimizer.safetensors")
            assert any(tensor.dtype == torch.uint8 for tensor in stored.values())
    else:
        assert load_tree(trainer.run.checkpoint(1), "optimizer")["state"] == {}


def test_skipped_steps_are_counted_and_part_of_no_mean(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    each = trainer_of(make_config(tmp_path, pico_llama, *SKIP, name="each"))
    spoil_gradient(each, 3, NAN)
    with caplog.at_level(logging.WARNING, logger="qlora_train"):
        each.train()
    assert "step 3: the gradient norm is nan" in caplog.text
    assert "step skipped (1 of at most 5); rows of this step:" in caplog.text
    assert "rows.jsonl:" in caplog.text
    logged = {entry["step"]: entry["loss"] for entry in each.state.log_history if "loss" in entry}
    assert sorted(logged) == [1, 2, 4, 5, 6]
    assert each.guard.mean_loss == pytest.approx(sum(logged.values()) / 5, rel=1e-6)
    pairs = trainer_of(make_config(tmp_path, pico_llama, *SKIP, "train.logging_steps=2", name="pairs"))
    spoil_gradient(pairs, 3, NAN)
    pairs.train()
    means = {entry["step"]: entry["loss"] for entry in pairs.state.log_history if "loss" in entry}
    wanted = {2: (logged[1] + logged[2]) / 2, 4: logged[4], 6: (logged[5] + logged[6]) / 2}
    assert means == pytest.approx(wanted, rel=1e-6)


def test_skipped_steps_change_no_learning_rate(undisturbed: QloraTrainer, pico_llama: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_config(tmp_path, pico_llama, *SKIP))
    spoil_loss(trainer, 2, NAN)
    trainer.train()

    def rates(of: QloraTrainer) -> dict[int, float]:
        return {entry["step"]: entry["learning_rate"] for entry in of.state.log_history if "learning_rate" in entry}

    assert rates(trainer) == {step: rate for step, rate in rates(undisturbed).items() if step != 2}
    assert len(rates(trainer)) == 5


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_run_continues_the_count_of_skipped_steps(step: int, pico_llama: Path, tmp_path: Path) -> None:
    config = make_config(tmp_path, pico_llama, *SKIP, "train.max_skipped_steps=2")
    straight = trainer_of(config)
    for number in (1, 3):
        spoil_gradient(straight, number, -INF)
    straight.train()
    assert straight.guard.counts()["num_skipped_steps"] == 2
    again = trainer_of(config)
    for number in (1, 3):
        spoil_gradient(again, number, -INF)
    again.train(resume_from_checkpoint=str(straight.run.checkpoint(step)))
    assert equal(weights(again), weights(straight))
    assert again.guard.state() == straight.guard.state()
    one_more = trainer_of(config)
    spoil_gradient(one_more, 3, -INF)
    spoil_gradient(one_more, 5, NAN)
    with pytest.raises(
        TrainingError, match=r"^step 5: .* 2 steps were skipped before, the limit of train\.max_skipped_steps"
    ):
        one_more.train(resume_from_checkpoint=str(straight.run.checkpoint(step)))


@pytest.mark.parametrize("value", [NAN, -INF])
def test_non_finite_weight_is_not_saved(value: float, pico_llama: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_config(tmp_path, pico_llama, *EVERY_STEP))
    trainer.add_callback(spoiling_weight(trainer, 3, value, after=True))
    with pytest.raises(TrainingError, match=r"^step 3: \S*lora_[AB]\S* has 1 of 512 values that are not finite after"):
        trainer.train()
    assert trainer.run.checkpoint_steps() == [1, 2]


def test_non_finite_optimizer_state_is_not_saved(pico_llama: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_config(tmp_path, pico_llama, *EVERY_STEP, "train.optim=adamw_torch"))

    def spoil() -> None:
        next(iter(trainer.optimizer.state.values()))["exp_avg_sq"].view(-1)[3] = INF

    trainer.add_callback(Spoiler(3, spoil, after=True))
    with pytest.raises(TrainingError, match=r"^step 3: the optimizer's exp_avg_sq of \S*lora_A\S* has 1 of 512 values"):
        trainer.train()
    assert trainer.run.checkpoint_steps() == [1, 2]


def test_non_finite_adapter_is_not_the_result(
    pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights break after the last checkpoint was written."""
    original = QloraTrainer.save

    def spoil_afterwards(self: QloraTrainer) -> None:
        original(self)
        next(iter(trainable_state(self.model).values())).data.view(-1)[0] = NAN

    monkeypatch.setattr(QloraTrainer, "save", spoil_afterwards)
    config = make_config(tmp_path, pico_llama, "data.eval=null", "train.eval_steps=null", "train.max_steps=1")
    with pytest.raises(TrainingError, match=r"^step 1: \S*lora_A\S* has 1 of 512 values that are not finite"):
        train_run(tmp_path, pico_llama, "data.eval=null", "train.eval_steps=null", "train.max_steps=1")
    assert not RunFolder(Path(str(config.run.output_dir))).adapter.exists()


def test_non_finite_initial_adapter_is_refused(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, "train.max_steps=1")
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[2]
    tensors[name].view(-1)[:2] = -INF
    save_file(tensors, file)
    with pytest.raises(ConfigError, match=rf"^lora\.adapter_path: \S+: {file.name}: {name} has 2 of 512 values"):
        train_run(tmp_path, pico_llama, "train.max_steps=1", f"lora.adapter_path={run.adapter}", name="second")


# --- float16 ------------------------------------------------------------------------------------------------------------


def scaled_trainer(config: RunConfig, init_scale: float) -> QloraTrainer:
    """Return a trainer with a real loss scaler and autocast to float16, as a GPU without bfloat16 has them."""
    trainer = trainer_of(config)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=3)
    trainer.accelerator.native_amp = True
    trainer.accelerator.state._mixed_precision = "fp16"
    return trainer


FLOAT16 = (
    "quantization.bnb_4bit_compute_dtype=float32",
    "data.eval=null",
    "train.eval_steps=null",
    "train.save_steps=1",
)
TOO_LARGE = 2.0**22
"""A scale at which the first gradients overflow; each overflow halves it."""


@pytest.fixture
def own_accelerate() -> Iterator[None]:
    """Reset accelerate's shared state after the test."""
    yield
    AcceleratorState._reset_state()


@pytest.mark.usefixtures("own_accelerate")
def test_overflows_of_the_loss_scaler_are_skipped_counted_and_resumed(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, pico_llama, *FLOAT16, "train.max_steps=8")
    straight = scaled_trainer(config, TOO_LARGE)
    with caplog.at_level(logging.WARNING, logger="qlora_train"):
        straight.train()
    num_skips = straight.guard.num_overflows
    assert 1 < num_skips < MAX_SCALER_SKIPS - 1
    assert caplog.text.count("the loss scaler skips the update") == num_skips
    assert straight.guard.num_updates == 8 - num_skips
    assert straight.lr_scheduler.last_epoch == 8
    for step in (num_skips, num_skips + 1):
        again = scaled_trainer(config, 1.0)
        again.train(resume_from_checkpoint=str(straight.run.checkpoint(step)))
        assert equal(weights(again), weights(straight))
        assert again.guard.state() == straight.guard.state()
        assert again.accelerator.scaler.state_dict() == straight.accelerator.scaler.state_dict()


@pytest.mark.usefixtures("own_accelerate")
def test_repeated_overflows_stop_the_run(pico_llama: Path, tmp_path: Path) -> None:
    trainer = scaled_trainer(make_config(tmp_path, pico_llama, *FLOAT16, "train.max_steps=20"), 2.0**60)
    before = weights(trainer)
    with pytest.raises(
        TrainingError, match=rf"^step {MAX_SCALER_SKIPS}: the gradient norm is .* consecutive overflow in float16"
    ):
        trainer.train()
    assert equal(weights(trainer), before)
    assert trainer.run.checkpoint_steps() == list(range(1, MAX_SCALER_SKIPS))


@pytest.mark.usefixtures("own_accelerate")
def test_non_finite_loss_is_no_overflow(pico_llama: Path, tmp_path: Path) -> None:
    trainer = scaled_trainer(make_config(tmp_path, pico_llama, *FLOAT16, "train.on_nonfinite=skip"), 1.0)
    spoil_loss(trainer, 3, NAN)
    trainer.train()
    assert trainer.guard.counts() == {"num_skipped_steps": 1, "num_scaler_skips": 0, "num_loss_spikes": 0}
    assert equal(*(load_tree(trainer.run.checkpoint(step), "adapter") for step in (2, 3)))
    assert trainer.lr_scheduler.last_epoch == 6


# --- spikes of the loss -------------------------------------------------------------------------------------------------

LONG = (*EVERY_STEP, "train.max_steps=26", "train.gradient_accumulation_steps=1", "train.learning_rate=1e-3")


def spoil_logits_at(trainer: QloraTrainer, *steps: int) -> None:
    """Make the model confident of wrong tokens in some steps."""

    def hook(_module: torch.nn.Module, _inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits * -20 if trainer.state.global_step + 1 in steps else logits

    trainer.model.get_output_embeddings().register_forward_hook(hook)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "after a median of" in record.getMessage()]


def test_spike_warns_once_at_the_same_step_when_resumed(
    pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(tmp_path, pico_llama, *LONG)
    caplog.set_level(logging.WARNING, logger="qlora_train")
    straight = trainer_of(config)
    spoil_logits_at(straight, 10, 21, 23)
    straight.train()
    (warning,) = warnings_of(caplog)
    logged = {entry["step"]: entry["loss"] for entry in straight.state.log_history if "loss" in entry}
    median = statistics.median(logged[step] for step in range(1, 21))
    assert warning.startswith(f"step 21: the loss is {logged[21]:.4f}, after a median of {median:.4f} (limit ")
    assert "rows of this step: " in warning
    assert "rows.jsonl:" in warning
    for step in (20, 22):
        caplog.clear()
        again = trainer_of(config)
        spoil_logits_at(again, 10, 21, 23)
        again.train(resume_from_checkpoint=str(straight.run.checkpoint(step)))
        assert warnings_of(caplog) == ([warning] if step < 21 else [])
        assert again.guard.state() == straight.guard.state()
        assert equal(weights(again), weights(straight))


def test_spike_stops_the_run_before_the_update_if_configured(pico_llama: Path, tmp_path: Path) -> None:
    trainer = trainer_of(make_config(tmp_path, pico_llama, *LONG, "train.on_loss_spike=stop"))
    spoil_logits_at(trainer, 21)
    with pytest.raises(
        TrainingError,
        match=r"^step 21: the loss is .*, after a median of .*; nothing was updated; .*on_loss_spike=warn",
    ):
        trainer.train()
    assert trainer.run.checkpoint_steps() == list(range(1, 21))
    assert equal(weights(trainer), load_tree(trainer.run.checkpoint(20), "adapter"))


def test_ignored_spike_changes_nothing(pico_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="qlora_train")
    ends = []
    for setting in ("ignore", "warn"):
        config = make_config(tmp_path, pico_llama, *LONG, f"train.on_loss_spike={setting}", name=setting)
        trainer = trainer_of(config)
        spoil_logits_at(trainer, 21)
        trainer.train()
        ends.append(weights(trainer))
        assert len(warnings_of(caplog)) == (setting == "warn")
    assert equal(*ends)


def test_losses_of_pairs_are_no_spikes(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="qlora_train")
    for objective, num_warnings in (("sft", 1), ("dpo", 0)):
        guard = NonFiniteGuard(TrainSection(objective=objective))
        for number, loss in enumerate([*[0.01] * 20, 2.0], start=1):
            assert guard.allow(Step(number, loss, 1.0, False, lambda: "pairs.jsonl:1"))
        assert len(warnings_of(caplog)) == guard.num_spikes == num_warnings
        caplog.clear()


def detector_of(values: list[float]) -> LossSpikeDetector:
    window = LossSpikeDetector()
    for value in values:
        window.add(value)
    return window


@pytest.mark.parametrize("value", [NAN, INF, 1e30])
def test_nan_and_infinity_are_spikes(value: float) -> None:
    assert detector_of([2.0] * 20).detect(value) is not None


def test_spikes_are_detected_by_median_and_mad_of_the_last_losses() -> None:
    generator = random.Random(3)
    losses = [generator.gauss(2.0, 0.5) for _ in range(200)]
    last = losses[-WINDOW_STEPS:]
    middle = statistics.median(last)
    spread = 1.4826 * statistics.median([abs(loss - middle) for loss in last])
    window = detector_of(losses)
    assert window.detect(middle + 7.99 * spread) is None
    assert window.detect(middle + 8.01 * spread) == Spike(
        middle + 8.01 * spread, middle, pytest.approx(middle + 8 * spread)
    )
    assert detector_of([0.1] * 40).detect(0.59) is None, "at least half a nat above the median"
    assert detector_of([0.1] * 40).detect(0.61) is not None
    assert detector_of([0.1] * (MIN_STEPS - 1)).detect(1e9) is None, "too few losses"


@given(st.lists(st.floats(0, 20), max_size=150), st.integers(0, 150))
def test_restored_detector_equals_the_saved_one(values: list[float], cut: int) -> None:
    straight = detector_of(values)
    saved = LossSpikeDetector()
    saved.restore(json.loads(json.dumps(detector_of(values[:cut]).state())))
    for value in values[cut:]:
        saved.add(value)
    assert saved.state() == straight.state()
    assert all(saved.detect(loss) == straight.detect(loss) for loss in (0.0, 3.0, 30.0))


def test_metrics_of_a_skipped_step_are_in_no_mean(pico_llama: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs.jsonl")
    settings = (*SKIP, f"data.train={pairs}", "data.max_length=192", "train.objective=dpo", "train.logging_steps=2")
    trainer, _ = trainers.trainer_of(make_config(tmp_path, pico_llama, *settings, "train.max_steps=4"))
    spoil_loss(trainer, 3, NAN)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "rewards/margins" in entry]
    assert [entry["step"] for entry in logged] == [2, 4]
    assert all(math.isfinite(value) for entry in logged for value in entry.values())
    assert trainer.guard.num_skipped == 1
