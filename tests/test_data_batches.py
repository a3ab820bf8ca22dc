"""Examples become padded batches, in an order that is a pure function of the seed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.data.batches import IGNORED, MEGABATCH_BATCHES, Collator, epoch_order, padding_multiple, to_dataset
from qlora_train.data.types import Example

EXAMPLES = [
    Example("a:1", (5, 6, 7), (False, True, True), None, None),
    Example("a:2", tuple(range(1, 10)), (False,) * 8 + (True,), None, None),
]


def test_the_data_set_holds_tokens_labels_and_row_numbers() -> None:
    dataset = to_dataset(EXAMPLES)
    assert dataset[0] == {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "row": 0}
    assert dataset[1]["labels"] == [IGNORED] * 8 + [9]
    assert dataset["row"][:] == [0, 1]


def test_the_collator_pads_right_and_never_labels_padding() -> None:
    batch = Collator(pad_token_id=7, multiple_of=8)(list(to_dataset(EXAMPLES)))
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "input_ids": (2, 16), "attention_mask": (2, 16), "labels": (2, 16), "row": (2,),
    }  # fmt: skip
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["input_ids"][0].tolist() == [5, 6, 7] + [7] * 13
    assert batch["labels"][0].tolist() == [IGNORED, 6, 7] + [IGNORED] * 13
    assert batch["attention_mask"].sum(1).tolist() == [3, 9]
    assert batch["row"].tolist() == [0, 1]


def test_padding_costs_nothing_where_there_are_no_tensor_cores() -> None:
    lengths = {
        device: Collator(0, padding_multiple(torch.device(device)))(list(to_dataset(EXAMPLES)))["input_ids"].shape[1]
        for device in ("cpu", "cuda")
    }
    assert lengths == {"cpu": 9, "cuda": 16}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 100), max_size=400),
    batch_size=st.integers(1, 4),
    grouped=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_an_epoch_visits_every_row_once(lengths: list[int], batch_size: int, grouped: bool, seed: int) -> None:
    order = epoch_order(lengths, seed=seed, epoch=1, batch_size=batch_size, group_by_length=grouped)
    assert sorted(order) == list(range(len(lengths)))


def test_the_order_depends_on_seed_and_epoch_and_leaves_the_global_generator_alone() -> None:
    lengths = [i % 37 + 1 for i in range(1000)]
    state = torch.get_rng_state()
    for grouped in (False, True):
        settings_ = {"batch_size": 4, "group_by_length": grouped}
        orders = [epoch_order(lengths, seed=s, epoch=e, **settings_) for s, e in ((1, 0), (1, 1), (2, 0), (1, 0))]
        assert orders[0] == orders[3]
        assert orders[0] != orders[1] != orders[2] != orders[0]
        torch.rand(3)
        assert epoch_order(lengths, seed=1, epoch=0, **settings_) == orders[0]
    torch.set_rng_state(state)
    epoch_order(lengths, seed=1, epoch=0, batch_size=4, group_by_length=True)
    assert torch.equal(torch.get_rng_state(), state)


def test_grouping_by_length_pads_little_and_keeps_batches_in_random_order() -> None:
    lengths = torch.randint(1, 1000, (1003,), generator=torch.Generator().manual_seed(0)).tolist()

    def padding(order: list[int]) -> int:
        batches = [[lengths[row] for row in order[i : i + 4]] for i in range(0, len(order), 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    plain, grouped = (
        epoch_order(lengths, seed=5, epoch=0, batch_size=4, group_by_length=group) for group in (False, True)
    )
    assert padding(grouped) < padding(plain) / 10
    longest = [max(lengths[row] for row in grouped[i : i + 4]) for i in range(0, 1000, 4)]
    assert longest[:MEGABATCH_BATCHES] != sorted(longest[:MEGABATCH_BATCHES], reverse=True)
