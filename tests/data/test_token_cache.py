"""The cache of tokenised data: found by content, verified, made once, limited in size."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_train.data.token_cache import StoreCache, key_of
from qlora_train.utils.errors import DataError

KEYS = [character * 64 for character in "abcd"]


def as_it_is(folder: Path) -> Path:
    return folder


def writes(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "tokens.bin").write_text(text)

    return make


def test_a_store_is_made_once_and_then_found(tmp_path: Path) -> None:
    cache, calls = StoreCache(str(tmp_path / "deep" / "cache"), "1MB"), []
    for expected in (False, True, True):
        folder, cached = cache.get(KEYS[0], writes("one", calls), as_it_is)
        assert (cached, (folder / "tokens.bin").read_text()) == (expected, "one")
    assert calls == ["one"]


@pytest.mark.parametrize("damage", ["changed", "shortened", "deleted", "no manifest"])
def test_a_damaged_store_is_made_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    folder, _ = cache.get(KEYS[0], writes("a long enough text"), as_it_is)
    file = folder / ("manifest.json" if damage == "no manifest" else "tokens.bin")
    if damage == "changed":
        file.write_text("A long enough text")
    elif damage == "shortened":
        file.write_text("a long")
    else:
        file.unlink()
    with caplog.at_level("WARNING", logger="qlora_train"):
        again, cached = cache.get(KEYS[0], writes("a long enough text"), as_it_is)
    assert not cached
    assert (again / "tokens.bin").read_text() == "a long enough text"
    assert "is damaged" in caplog.text


def test_a_store_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")

    def fail(folder: Path) -> None:
        (folder / "tokens.bin").write_text("half")
        raise DataError("row 7 is wrong")

    with pytest.raises(DataError, match="row 7"):
        cache.get(KEYS[0], fail, as_it_is)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert cache.get(KEYS[0], writes("whole"), as_it_is)[1] is False


def test_the_least_recently_used_stores_make_room_and_the_present_one_stays(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    for age, key in enumerate(KEYS[:3]):
        folder, _ = cache.get(key, writes("x" * 400_000 if key != KEYS[2] else "x"), as_it_is)
        os.utime(folder, (1000 + age, 1000 + age))
    other = tmp_path / "somebody's folder"
    other.mkdir()
    cache.get(KEYS[0], writes(""), as_it_is)  # used again, so that the second one is the oldest
    cache.get(KEYS[3], writes("x" * 500_000), as_it_is)
    assert sorted(path.name[0] for path in tmp_path.iterdir() if path.is_dir()) == ["a", "c", "d", "s"]
    alone, _ = cache.get(KEYS[1], writes("x" * 3_000_000), as_it_is)
    assert [path for path in tmp_path.iterdir() if len(path.name) == 64] == [alone]


def test_two_processes_at_once_make_a_store_once(tmp_path: Path) -> None:
    calls: list[str] = []
    started = threading.Event()

    def slow(folder: Path) -> None:
        calls.append("made")
        started.set()
        threading.Event().wait(0.2)
        (folder / "tokens.bin").write_text("one")

    first = threading.Thread(target=lambda: StoreCache(str(tmp_path), "1MB").get(KEYS[0], slow, as_it_is))
    first.start()
    started.wait()
    _, cached = StoreCache(str(tmp_path), "1MB").get(KEYS[0], slow, as_it_is)
    first.join()
    assert (cached, calls) == (True, ["made"])


def test_what_a_killed_process_left_is_deleted_and_what_is_being_made_is_not(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    for key in KEYS[:2]:
        (tmp_path / f".{key}.staging").mkdir()
        (tmp_path / f".{key}.staging" / "tokens.bin").write_text("half")
    with cache._locked(KEYS[1]):
        cache.get(KEYS[2], writes("one"), as_it_is)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".staging")] == [f".{KEYS[1]}.staging"]


def test_stores_that_others_delete_stay_readable_once_they_are_open(tmp_path: Path) -> None:
    def read(number: int) -> str:
        cache = StoreCache(str(tmp_path), "1MB")
        text = str(number) * 400_000
        store, _ = cache.get(KEYS[number], writes(text), lambda folder: (folder / "tokens.bin").open())
        with store:
            return store.read()[:1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [0, 1, 2, 3] * 15)) == ["0", "1", "2", "3"] * 15


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^data.cache_dir: .*file/cache: tokenised data cannot be kept there: "):
        StoreCache(str(tmp_path / "file" / "cache"), "1MB").get(KEYS[0], writes("one"), as_it_is)


def test_the_key_follows_content_and_settings_and_not_paths(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    keys = [
        key_of([a], {"max_length": 8}), key_of([c], {"max_length": 8}), key_of([a], {"max_length": 9}),
        key_of([a, c], {"max_length": 8}), key_of([c, a], {"max_length": 8}),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert key_of([b], {"max_length": 8}) == keys[0]
