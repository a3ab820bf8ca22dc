"""A run resumes with its settings, or with changes that its user allows, which then take effect."""

import json
import re
import shutil
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

import pytest

from qlora_train.config import RunConfig
from qlora_train.config.resume_policy import FIXED_SHAPE, RUN_METADATA, effect_of, is_mutable
from qlora_train.runs import RunFolder, check_same_settings, record_metadata
from qlora_train.utils.errors import CheckpointError
from tests.support.runs import adapter_bytes, losses, make_config, metrics, train_run

KEYS = [
    f"{section}.{name}" for section, spec in RunConfig.model_fields.items() for name in spec.annotation.model_fields
]  # fmt: skip
CRITICAL = [key for key in KEYS if not is_mutable(key)]
EVERY_STEP = ("train.save_steps=1",)
FLAT = ("train.lr_scheduler_type=constant", "train.warmup_ratio=0")


def another(value: Any, annotation: Any) -> Any:
    """Return another value of a setting's type."""
    choices = [item for item in get_args(annotation) if get_origin(annotation) is Literal]
    if choices:
        return next(item for item in choices if item != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}-other"
    if isinstance(value, tuple):
        return () if value else ("other",)
    if isinstance(value, dict):
        return {"other": "other"}
    kinds = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    made = {int: 3, float: 0.5, str: "other", bool: True}
    return next((made[kind] for kind in kinds if kind in made), {"other": "other"})


def with_other(config: RunConfig, key: str) -> RunConfig:
    """Return the config with one setting changed."""
    section, _, name = key.partition(".")
    part = getattr(config, section)
    value = another(getattr(part, name), type(part).model_fields[name].annotation)
    assert value != getattr(part, name)
    return config.model_copy(update={section: part.model_copy(update={name: value})})


@pytest.fixture(scope="module")
def begun(pico_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunConfig]:
    """A run after its second of two steps, unfinished."""
    folder = tmp_path_factory.mktemp("begun")
    settings = (*EVERY_STEP, "train.max_steps=2")
    run = train_run(folder, pico_llama, *settings)
    shutil.rmtree(run.adapter)
    return run, make_config(folder, pico_llama, *settings)


def test_the_list_of_settings_is_not_empty() -> None:
    assert len(CRITICAL) > 40
    assert set(FIXED_SHAPE) <= set(CRITICAL)


@pytest.mark.parametrize("key", CRITICAL)
def test_every_critical_setting_is_refused_with_both_values_and_consequence(
    key: str, begun: tuple[RunFolder, RunConfig]
) -> None:
    run, config = begun
    with pytest.raises(CheckpointError) as caught:
        check_same_settings(run, with_other(config, key))
    (line,) = caught.value.problems
    assert re.match(rf"{re.escape(f'{run.path}: {key}')}(\.other)? was ", line), "a mapping is named entry by entry"
    assert " when this run began and is " in line
    if key in FIXED_SHAPE:
        assert "checkpoints of this run do not fit it; set it back or choose another run.output_dir" in line
    else:
        assert f"{effect_of(key)}; set it back, accept that with 'run.allow_changed=[{key}]' or choose another" in line


@pytest.mark.parametrize("key", [key for key in KEYS if is_mutable(key)])
def test_mutable_settings_may_differ(key: str, begun: tuple[RunFolder, RunConfig]) -> None:
    run, config = begun
    check_same_settings(run, with_other(config, key))


@pytest.mark.parametrize("key", list(RUN_METADATA))
def test_every_metadata_field_is_refused_by_name(key: str, begun: tuple[RunFolder, RunConfig]) -> None:
    run, config = begun
    facts = {name: value for name, value in run.metadata().items() if name in RUN_METADATA}
    assert facts.keys() == RUN_METADATA.keys(), "a run records every fact"
    record_metadata(run, config, facts)
    changed = {**facts[key], "torch": "0.1"} if isinstance(facts[key], dict) else "other"
    before = run.metadata_file.read_bytes()
    with pytest.raises(
        CheckpointError, match=rf"{key}\S* was .* now: {RUN_METADATA[key]}; .*run\.allow_changed=\[{key}\]"
    ):
        record_metadata(run, config, {**facts, key: changed})
    assert run.metadata_file.read_bytes() == before, "what is refused leaves no trace"


def test_only_the_version_that_differs_is_named(begun: tuple[RunFolder, RunConfig]) -> None:
    run, config = begun
    facts = {name: value for name, value in run.metadata().items() if name in RUN_METADATA}
    with pytest.raises(CheckpointError) as caught:
        record_metadata(run, config, {**facts, "versions": {**facts["versions"], "torch": "0.1"}})
    (line,) = caught.value.problems
    assert "versions.torch was" in line
    assert "is '0.1' now" in line


def stop_after(step: int, run: RunFolder) -> None:
    """Turn a finished run into one that was killed after `step`."""
    shutil.rmtree(run.adapter)
    for later in [number for number in run.checkpoint_steps() if number > step]:
        shutil.rmtree(run.checkpoint(later))


def test_an_allowed_change_of_the_learning_rate_takes_effect(pico_llama: Path, tmp_path: Path) -> None:
    settings = (*EVERY_STEP, "train.lr_scheduler_type=linear")
    run = train_run(tmp_path, pico_llama, *settings)
    straight = metrics(run)
    stop_after(3, run)
    changed = ("train.learning_rate=1e-3", "run.allow_changed=[train.learning_rate]")
    train_run(tmp_path, pico_llama, *settings, *changed)
    rates = [line["learning_rate"] for line in straight if "loss" in line]
    found = [line["learning_rate"] for line in metrics(run) if "loss" in line]
    assert found[:3] == rates[:3]
    assert found[3:] == pytest.approx([rate / 10 for rate in rates[3:]])
    assert losses(run)[4:] != [line["loss"] for line in straight if "loss" in line][4:]


def test_other_hyperparameters_of_the_optimizer_apply_too(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, *EVERY_STEP)
    before = adapter_bytes(run)
    stop_after(5, run)
    train_run(tmp_path, pico_llama, *EVERY_STEP, "train.weight_decay=0.5", "run.allow_changed=[train.weight_decay]")
    assert adapter_bytes(run) != before


@pytest.mark.parametrize("killed_after", [None, 2])
def test_an_allowed_change_of_the_number_of_steps_takes_effect(
    killed_after: int | None, pico_llama: Path, tmp_path: Path
) -> None:
    """With a constant learning rate, the first steps of a longer run are those of a shorter one."""
    longer = train_run(tmp_path, pico_llama, *EVERY_STEP, *FLAT, "train.max_steps=6", name="longer")
    run = train_run(tmp_path, pico_llama, *EVERY_STEP, *FLAT, "train.max_steps=4")
    if killed_after is not None:
        stop_after(killed_after, run)
    changed = ("train.max_steps=6", "run.allow_changed=[train.max_steps]")
    train_run(tmp_path, pico_llama, *EVERY_STEP, *FLAT, *changed)
    assert run.read_results()["training"]["steps"] == 6
    assert adapter_bytes(run) == adapter_bytes(longer)
    assert losses(run) == losses(longer)


def test_an_accepted_change_is_recorded_and_compared_with_from_then_on(pico_llama: Path, tmp_path: Path) -> None:
    run = train_run(tmp_path, pico_llama, *EVERY_STEP)
    stop_after(3, run)
    allowed = "run.allow_changed=[train.learning_rate]"
    train_run(tmp_path, pico_llama, *EVERY_STEP, "train.learning_rate=1e-3", allowed)
    (entry,) = json.loads(run.metadata_file.read_text())["changes"]
    assert entry == {"after_step": 3, "key": "train.learning_rate", "before": 0.01, "now": 0.001}
    train_run(tmp_path, pico_llama, *EVERY_STEP, "train.learning_rate=1e-3")
    with pytest.raises(CheckpointError, match=r"train\.learning_rate was 0\.001"):
        train_run(tmp_path, pico_llama, *EVERY_STEP)


def test_a_finished_run_with_an_accepted_change_is_unfinished(
    pico_llama: Path, tmp_path: Path, messages: pytest.LogCaptureFixture
) -> None:
    """As after a kill between the acceptance and the first new step: the old adapter does not count as the result."""
    run = train_run(tmp_path, pico_llama, *EVERY_STEP, "train.max_steps=2")
    facts = run.metadata()
    assert run.is_finished()
    run.merged.mkdir()
    longer = make_config(tmp_path, pico_llama, *EVERY_STEP, "train.max_steps=3", "run.allow_changed=[train.max_steps]")
    record_metadata(run, longer, {name: facts[name] for name in RUN_METADATA})
    assert not run.is_finished()
    train_run(tmp_path, pico_llama, *EVERY_STEP, "train.max_steps=3")
    assert run.is_finished()
    training = run.read_results()["training"]
    assert training["steps"] == 3
    span = training["since_last_start"]
    assert span["num_steps"] == 1
    assert 0 < span["num_tokens"] < training["num_tokens"], "tokens and seconds are those of the same steps"
    assert "training further will replace the adapter and delete merged, results.json" in messages.text
    assert not run.merged.exists()
