"""Rows are selected by content and seed, compared with plain Python."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qlora_train.config.schema import Source
from qlora_train.data.selection import content_order, first_occurrences, held_out_mask, is_among, mix
from qlora_train.data.token_store import Rows
from qlora_train.utils.errors import DataError
from tests.support.stores import example, rows_of, store_of


def rows_with(folder: Path, *contents: int) -> Rows:
    return rows_of(folder, [example([1, 2], [0, 1])] * len(contents), digests=contents)


WORDS = st.lists(st.integers(0, 5) | st.just(3 << 64), max_size=30)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(contents=WORDS, others=WORDS)
def test_duplicates_and_shared_rows_are_found(
    tmp_path_factory: pytest.TempPathFactory, contents: list[int], others: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("stores")
    rows, held_out = rows_with(folder / "a", *contents), rows_with(folder / "b", *others)
    assert first_occurrences(rows).tolist() == [word not in contents[:i] for i, word in enumerate(contents)]
    assert is_among(rows, held_out).tolist() == [word in others for word in contents]


def test_a_sample_depends_on_content_and_seed_and_not_on_order() -> None:
    digests = np.random.default_rng(0).integers(0, 2**63, (1000, 2)).astype(np.uint64)
    shuffled = np.random.default_rng(1).permutation(1000)
    chosen = {tuple(digests[i]) for i in content_order(digests, 7)[:100]}
    assert {tuple(digests[shuffled][i]) for i in content_order(digests[shuffled], 7)[:100]} == chosen
    other = {tuple(digests[i]) for i in content_order(digests, 8)[:100]}
    assert len(chosen & other) < 30  # 10 are expected by chance


@pytest.mark.parametrize(
    ("amounts", "expected"),
    [
        ({}, {"a": 10, "b": 4}),
        ({"weight": 0.5}, {"a": 5, "b": 4}),
        ({"weight": 2.5}, {"a": 25, "b": 4}),
        ({"num_rows": 3}, {"a": 3, "b": 4}),
        ({"num_rows": 23}, {"a": 23, "b": 4}),
        ({"weight": 0.001}, {"a": 1, "b": 4}),
    ],
)
def test_weight_and_num_rows_set_the_rows_of_a_source(
    tmp_path: Path, amounts: dict[str, float], expected: dict[str, int]
) -> None:
    stores = [store_of(tmp_path / name, [example([1, 2], [0, 1])] * count) for name, count in (("a", 10), ("b", 4))]
    sources = [Source.model_validate({"path": "a", **amounts}), Source(path="b")]
    mixed = mix(sources, Rows.all_of(stores), None, seed=0)
    counts = Counter(mixed.indices.tolist())
    from_a = [counts[i] for i in range(10)]
    assert sum(from_a) == expected["a"]
    assert max(from_a) - min(from_a) <= 1, "each row is seen as often as any other, or once more"
    assert [counts[i] for i in range(10, 14)] == [1] * 4
    assert mix(sources, Rows.all_of(stores), None, seed=0).indices.tolist() == mixed.indices.tolist()
    if expected["a"] in (3, 5):
        others = [mix(sources, Rows.all_of(stores), None, seed=seed).indices.tolist() for seed in range(1, 6)]
        assert any(other != mixed.indices.tolist() for other in others)


def test_max_rows_takes_a_sample_of_the_mixture_in_its_order(tmp_path: Path) -> None:
    rows = rows_with(tmp_path / "a", *range(50))
    few = mix([Source(path="a")], rows, 20, seed=0)
    assert len(few) == 20
    assert few.indices.tolist() == sorted(set(few.indices.tolist()))
    assert few.indices.tolist() != list(range(20))
    assert len(mix([Source(path="a")], rows, 50, seed=0)) == len(mix([Source(path="a")], rows, 999, seed=0)) == 50


@pytest.mark.parametrize("weight", [0.1, 2])
def test_max_rows_takes_the_same_share_of_every_source(tmp_path: Path, weight: float) -> None:
    stores = [
        store_of(tmp_path / name, [example([1, 2], [0, 1])] * count, digests=range(start, start + count))
        for name, count, start in (("a", round(400 / weight), 0), ("b", 400, 10_000))
    ]
    for sources in ([Source(path="a", weight=weight), Source(path="b")],):
        few = mix(sources, Rows.all_of(stores), 80, seed=0)
        assert Counter(few.store_indices.tolist()) == {0: 40, 1: 40}
        assert len(set(few.indices.tolist())) == 80


def test_a_share_holds_out_equal_rows_together(tmp_path: Path) -> None:
    rows = rows_with(tmp_path / "a", *(list(range(2000)) * 2))
    held_out = held_out_mask(rows.digests, 0.1, seed=3)
    assert held_out[:2000].tolist() == held_out[2000:].tolist()
    assert 150 < held_out[:2000].sum() < 250
    assert held_out_mask(rows.digests, 0.1, seed=4).tolist() != held_out.tolist()


def test_a_share_that_leaves_nothing_is_refused(tmp_path: Path) -> None:
    rows = rows_with(tmp_path / "a", 1, 2)
    with pytest.raises(DataError, match=r"a share of 1e-09 of 2 rows leaves none to hold out"):
        held_out_mask(rows.digests, 1e-9, seed=0)
    with pytest.raises(DataError, match=r"leaves none to train on"):
        held_out_mask(rows.digests, 0.999999999, seed=0)
