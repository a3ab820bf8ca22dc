"""The ladder: every rung keeps the rows of a step, each is taken once, the bottom is reached."""

from dataclasses import replace

import pytest

from qlora_train.config.memory_fallbacks import Capabilities, as_overrides, changed_settings, next_fallback
from qlora_train.config.schema import TrainSection

EVERYTHING = Capabilities(on_gpu=True, recomputes=True, recomputes_all=False)
CPU = Capabilities(on_gpu=False, recomputes=True, recomputes_all=False)
NOTHING = Capabilities(on_gpu=False, recomputes=False, recomputes_all=False)


def settings(rows: int, steps: int, **others: object) -> TrainSection:
    return TrainSection.model_validate(
        {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, **others}
    )


def ladder(train: TrainSection, able: Capabilities) -> list[dict[str, object]]:
    """Return what each rung changes, from the top to the bottom."""
    changes = []
    while (smaller := next_fallback(train, able)) is not None:
        changes.append(changed_settings(train, smaller))
        train = smaller
    return changes


@pytest.mark.parametrize(
    ("rows", "sizes"),
    [(8, [4, 2, 1]), (6, [3, 1]), (9, [3, 1]), (7, [1]), (12, [6, 3, 1]), (35, [7, 1]), (1, [])],
)
@pytest.mark.parametrize("steps", [1, 5])
def test_a_micro_batch_is_divided_until_it_is_one_row_and_a_step_keeps_its_rows(
    rows: int, sizes: list[int], steps: int
) -> None:
    train, found = settings(rows, steps), []
    while (smaller := next_fallback(train, NOTHING)) is not None:
        train = smaller
        found.append(train.per_device_train_batch_size)
        assert train.per_device_train_batch_size * train.gradient_accumulation_steps == rows * steps
    assert found == sizes


def test_rungs_come_in_order_of_what_they_cost_and_each_once() -> None:
    assert ladder(settings(2, 1, gradient_checkpointing=False), EVERYTHING) == [
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"gradient_checkpointing": True},
        {"activation_offloading": True},
    ]


def test_what_cannot_be_done_or_is_done_already_is_left_out() -> None:
    assert ladder(settings(1, 4, gradient_checkpointing=False), NOTHING) == []
    assert ladder(settings(1, 4, gradient_checkpointing=False), CPU) == [{"gradient_checkpointing": True}]
    done = settings(1, 4, gradient_checkpointing=True, activation_offloading=True)
    assert ladder(done, EVERYTHING) == []


def test_layers_that_keep_more_than_their_input_are_recomputed_and_no_others() -> None:
    some = ladder(settings(1, 1, recompute="mlp"), EVERYTHING)
    assert some[0] == {"gradient_checkpointing": True, "recompute": "auto"}
    assert ladder(settings(1, 1), EVERYTHING)[0] == {"gradient_checkpointing": True}  # a plan that turned out too large
    assert ladder(settings(1, 1), replace(EVERYTHING, recomputes_all=True)) == [{"activation_offloading": True}]


def test_changes_are_shown_as_they_are_typed() -> None:
    changes = changed_settings(settings(4, 8), settings(2, 16, gradient_checkpointing=True))
    assert as_overrides(changes) == (
        "train.per_device_train_batch_size=2 train.gradient_accumulation_steps=16 train.gradient_checkpointing=true"
    )
