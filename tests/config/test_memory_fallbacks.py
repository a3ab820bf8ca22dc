"""Memory fallbacks keep the rows of a step, come once each, cheapest first, and end."""

from dataclasses import replace

import pytest

from qlora_train.config.memory_fallbacks import Capabilities, as_overrides, changed_settings, next_fallback
from qlora_train.config.schema import TrainSection

EVERYTHING = Capabilities(on_gpu=True, can_checkpoint=True, checkpoints_all=False)
CPU = Capabilities(on_gpu=False, can_checkpoint=True, checkpoints_all=False)
NOTHING = Capabilities(on_gpu=False, can_checkpoint=False, checkpoints_all=False)


def settings(rows: int, steps: int, **others: object) -> TrainSection:
    return TrainSection.model_validate(
        {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, **others}
    )


def all_changes(train: TrainSection, capabilities: Capabilities) -> list[dict[str, object]]:
    """Return what each fallback changes, in order."""
    changes = []
    while (smaller := next_fallback(train, capabilities)) is not None:
        changes.append(changed_settings(train, smaller))
        train = smaller
    return changes


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(8, [4, 2, 1]), (6, [3, 1]), (9, [3, 1]), (7, [1]), (12, [6, 3, 1]), (35, [7, 1]), (1, [])],
)
@pytest.mark.parametrize("steps", [1, 5])
def test_micro_batch_is_divided_down_to_one_row_and_steps_keep_their_rows(
    rows: int, sizes: list[int], steps: int
) -> None:
    train, found = settings(rows, steps), []
    while (smaller := next_fallback(train, NOTHING)) is not None:
        train = smaller
        found.append(train.per_device_train_batch_size)
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == rows * steps
    assert found == sizes


def test_fallbacks_come_once_each_cheapest_first() -> None:
    assert all_changes(settings(2, 1, gradient_checkpointing="none"), EVERYTHING) == [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": "full"},
        {"activation_offloading": True},
    ]


def test_unsupported_and_active_fallbacks_are_left_out() -> None:
    assert all_changes(settings(1, 4, gradient_checkpointing="none"), NOTHING) == []
    assert all_changes(settings(1, 4, gradient_checkpointing="none"), CPU) == [{"gradient_checkpointing": "full"}]
    done = settings(1, 4, gradient_checkpointing="full", activation_offloading=True)
    assert all_changes(done, EVERYTHING) == []


def test_full_checkpointing_replaces_partial_checkpointing_only() -> None:
    partial = all_changes(settings(1, 1, gradient_checkpointing="mlp"), EVERYTHING)
    assert partial[0] == {"gradient_checkpointing": "full"}
    assert all_changes(settings(1, 1), EVERYTHING)[0] == {"gradient_checkpointing": "full"}  # auto chose too little
    assert all_changes(settings(1, 1), replace(EVERYTHING, checkpoints_all=True)) == [{"activation_offloading": True}]


def test_changes_are_shown_as_command_line_arguments() -> None:
    changes = changed_settings(settings(4, 8), settings(2, 16, gradient_checkpointing="full"))
    assert as_overrides(changes) == (
        "train.per_device_train_batch_size=2 train.gradient_accumulation_steps=16 train.gradient_checkpointing=full"
    )
