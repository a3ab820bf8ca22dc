"""The cache of tokenised data: found by content, verified, made once, limited in size."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qlora_train.data.token_cache import StoreCache, cache_key
from qlora_train.utils.errors import DataError

KEYS = [character * 64 for character in "abcd"]


def opened(folder: Path) -> Path:
    return folder


def writes(text: str, calls: list[str] | None = None) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        if calls is not None:
            calls.append(text)
        (folder / "tokens.bin").write_text(text)

    return make


def test_a_store_is_written_once_and_then_cached(tmp_path: Path) -> None:
    cache, calls = StoreCache(str(tmp_path / "deep" / "cache"), "1MB"), []
    for expected in (False, True, True):
        folder, cached = cache.get(KEYS[0], writes("one", calls), opened)
        assert (cached, (folder / "tokens.bin").read_text()) == (expected, "one")
    assert calls == ["one"]


@pytest.mark.parametrize("damage", ["changed", "shortened", "deleted", "no manifest"])
def test_a_damaged_store_is_written_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    folder, _ = cache.get(KEYS[0], writes("a long enough text"), opened)
    file = folder / ("manifest.json" if damage == "no manifest" else "tokens.bin")
    if damage == "changed":
        file.write_text("A long enough text")
    elif damage == "shortened":
        file.write_text("a long")
    else:
        file.unlink()
    with caplog.at_level("WARNING", logger="qlora_train"):
        again, cached = cache.get(KEYS[0], writes("a long enough text"), opened)
    assert not cached
    assert (again / "tokens.bin").read_text() == "a long enough text"
    assert "is damaged" in caplog.text


def test_a_failed_store_leaves_nothing(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")

    def fail(folder: Path) -> None:
        (folder / "tokens.bin").write_text("half")
        raise DataError("row 7 is wrong")

    with pytest.raises(DataError, match="row 7"):
        cache.get(KEYS[0], fail, opened)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == []
    assert cache.get(KEYS[0], writes("whole"), opened)[1] is False


def test_the_least_recently_used_stores_are_deleted(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    for age, key in enumerate(KEYS[:3]):
        folder, _ = cache.get(key, writes("x" * 400_000 if key != KEYS[2] else "x"), opened)
        os.utime(folder, (1000 + age, 1000 + age))
    other = tmp_path / "somebody's folder"
    other.mkdir()
    cache.get(KEYS[0], writes(""), opened)  # used again, so that the second one is the oldest
    cache.get(KEYS[3], writes("x" * 500_000), opened)
    assert sorted(path.name[0] for path in tmp_path.iterdir() if path.is_dir()) == ["a", "c", "d", "s"]
    alone, _ = cache.get(KEYS[1], writes("x" * 3_000_000), opened)
    assert [path for path in tmp_path.iterdir() if len(path.name) == 64] == [alone]


def test_two_processes_write_a_store_once(tmp_path: Path) -> None:
    calls: list[str] = []
    started = threading.Event()

    def slow(folder: Path) -> None:
        calls.append("made")
        started.set()
        threading.Event().wait(0.2)
        (folder / "tokens.bin").write_text("one")

    first = threading.Thread(target=lambda: StoreCache(str(tmp_path), "1MB").get(KEYS[0], slow, opened))
    first.start()
    started.wait()
    _, cached = StoreCache(str(tmp_path), "1MB").get(KEYS[0], slow, opened)
    first.join()
    assert (cached, calls) == (True, ["made"])


def test_stale_folders_are_deleted_and_locked_ones_are_not(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    for key in KEYS[:2]:
        (tmp_path / f".{key}.staging").mkdir()
        (tmp_path / f".{key}.staging" / "tokens.bin").write_text("half")
    with cache._locked(KEYS[1]):
        cache.get(KEYS[2], writes("one"), opened)
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".staging")] == [f".{KEYS[1]}.staging"]


def test_open_stores_stay_readable_when_deleted(tmp_path: Path) -> None:
    def read(number: int) -> str:
        cache = StoreCache(str(tmp_path), "1MB")
        text = str(number) * 400_000
        store, _ = cache.get(KEYS[number], writes(text), lambda folder: (folder / "tokens.bin").open())
        with store:
            return store.read()[:1]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(read, [0, 1, 2, 3] * 15)) == ["0", "1", "2", "3"] * 15


def test_a_folder_that_cannot_be_created_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"^data.cache_dir: .*file/cache: tokenised data cannot be written: "):
        StoreCache(str(tmp_path / "file" / "cache"), "1MB").get(KEYS[0], writes("one"), opened)


def test_the_key_depends_on_content_and_settings_not_on_paths(tmp_path: Path) -> None:
    for name, text in (("a", "one"), ("b", "one"), ("c", "two")):
        (tmp_path / name).write_text(text)
    a, b, c = (tmp_path / name for name in "abc")
    keys = [
        cache_key([a], {"max_length": 8}), cache_key([c], {"max_length": 8}), cache_key([a], {"max_length": 9}),
        cache_key([a, c], {"max_length": 8}), cache_key([c, a], {"max_length": 8}),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert cache_key([b], {"max_length": 8}) == keys[0]


def test_a_store_that_cannot_be_read_is_a_one_line_error_with_what_to_do(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    folder, _ = cache.get(KEYS[0], writes("one"), opened)
    with pytest.raises(DataError) as caught:
        cache.get(KEYS[0], writes("one"), lambda folder: (folder / "rows.bin").open())
    assert str(caught.value) == (
        f"data.cache_dir: {folder}/rows.bin: tokenised data cannot be read: No such file or directory; make its files "
        f"readable, delete {folder}, or set data.cache_dir to another folder"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_a_file_of_a_store_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    cache = StoreCache(str(tmp_path), "1MB")
    folder, _ = cache.get(KEYS[0], writes("one"), opened)
    (folder / "tokens.bin").chmod(0)
    with pytest.raises(
        DataError, match=r"tokens\.bin: tokenised data cannot be read: Permission denied; make its files"
    ):
        cache.get(KEYS[0], writes("one"), opened)
