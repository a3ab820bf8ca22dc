"""The rows of a step are divided over ranks: every row once, balanced by tokens, the same on every rank."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_train.data.rank_shares import divide, share_of

SIZES = st.lists(st.integers(1, 4096), max_size=60)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 9))
def test_every_unit_belongs_to_one_rank(sizes: list[int], num_ranks: int) -> None:
    shares = divide(sizes, num_ranks)
    assert len(shares) == num_ranks
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    assert all(share == sorted(share) for share in shares)
    assert divide(list(sizes), num_ranks) == shares


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 9))
def test_ranks_differ_by_at_most_one_unit_of_tokens(sizes: list[int], num_ranks: int) -> None:
    loads = [sum(sizes[index] for index in share) for share in divide(sizes, num_ranks)]
    assert max(loads) - min(loads) <= max(sizes, default=0)
    assert all(loads) or len(sizes) < num_ranks


def test_one_rank_has_all_units_in_their_order() -> None:
    assert share_of(["a", "b", "c"], [1, 3, 2], 0, 1) == ["a", "b", "c"]
    assert [share_of(["a", "b", "c"], [1, 3, 2], rank, 2) for rank in range(2)] == [["b"], ["a", "c"]]


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_the_busiest_rank_of_a_usual_step_is_within_two_percent_of_the_mean(num_ranks: int) -> None:
    """Log-normal lengths, 16 rows per rank; the same rows cut in order would leave ranks waiting."""
    generator = np.random.default_rng(num_ranks)
    in_order = []
    for _ in range(20):
        sizes = np.minimum(generator.lognormal(5.5, 0.8, 16 * num_ranks).astype(int) + 1, 2048)
        loads = [sizes[share].sum() for share in divide(sizes.tolist(), num_ranks)]
        assert max(loads) <= 1.02 * np.mean(loads)
        in_order.append(max(chunk.sum() for chunk in np.split(sizes, num_ranks)) / np.mean(loads))
    assert np.mean(in_order) > 1.1
