"""Writes are atomic: damage is detected and failures keep the old content."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_train.utils import atomic_io
from qlora_train.utils.atomic_io import MANIFEST, atomic_folder, sha256_of, verify_manifest, write_manifest, write_text
from tests.support import fault_points

FILES = {"adapter.safetensors": b"\x00\x01\x02weights", "state.json": b'{"step": 3}', "deep/er/empty.txt": b""}


class StoppedError(BaseException):
    """A BaseException that is not an Exception."""


def fill(folder: Path, suffix: bytes = b"") -> None:
    for name, content in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content + suffix)


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with atomic_folder(tmp_path / "runs" / "step-1") as staging:
        fill(staging)
    return tmp_path / "runs" / "step-1"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_folder_has_a_manifest_of_every_file(written: Path) -> None:
    assert verify_manifest(written) is None
    found = content(written)
    entries = json.loads(found.pop(MANIFEST))["files"]
    assert found == FILES
    assert entries.keys() == FILES.keys()
    for name, entry in entries.items():
        assert entry == {"sha256": sha256_of(written / name), "size_bytes": len(FILES[name])}
    assert [path.name for path in written.parent.iterdir()] == ["step-1"], "nothing is left beside it"


def test_folder_does_not_exist_before_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "new") as staging:
        fill(staging)
        assert not (tmp_path / "new").exists()
    assert (tmp_path / "new").is_dir()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, StoppedError, OSError])
@pytest.mark.parametrize("existed", [True, False])
def test_exception_leaves_the_old_folder_and_no_staging(
    error: type[BaseException], existed: bool, written: Path
) -> None:
    target = written if existed else written.with_name("step-2")
    before = content(written.parent)

    def fail() -> None:
        with atomic_folder(target) as staging:
            fill(staging, b"new")
            raise error

    with pytest.raises(error):
        fail()
    assert content(written.parent) == before
    assert [path.name for path in written.parent.iterdir()] == ["step-1"]


def test_manifest_that_cannot_be_written_leaves_the_old_folder(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disk_full(_path: Path, _text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_io, "write_text", disk_full)
    with pytest.raises(OSError, match="No space left"), atomic_folder(written) as staging:
        fill(staging, b"new")
    assert verify_manifest(written) is None
    assert content(written)["state.json"] == FILES["state.json"]
    assert [path.name for path in written.parent.iterdir()] == ["step-1"]


def test_new_folder_replaces_the_old_one_as_a_whole(written: Path) -> None:
    with atomic_folder(written) as staging:
        (staging / "other.txt").write_text("new")
    assert content(written).keys() == {"other.txt", MANIFEST}
    assert verify_manifest(written) is None
    assert [path.name for path in written.parent.iterdir()] == ["step-1"]


def test_stale_files_do_not_block_a_new_folder(written: Path) -> None:
    for leftover in (".step-1.staging", ".step-1.old"):
        fill(written.with_name(leftover), b"half")
        (written.with_name(leftover) / "stray.bin").write_bytes(b"stray")
    with atomic_folder(written) as staging:
        assert list(staging.iterdir()) == []
        fill(staging, b"2")
    assert verify_manifest(written) is None
    assert content(written)["state.json"] == FILES["state.json"] + b"2"
    assert [path.name for path in written.parent.iterdir()] == ["step-1"]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_every_flipped_byte_is_detected(name: str, written: Path) -> None:
    file = written / name
    original = file.read_bytes()
    for position in range(len(original)):
        for bit in (0x01, 0x80):
            file.write_bytes(original[:position] + bytes([original[position] ^ bit]) + original[position + 1 :])
            assert _noticed(written), f"{name}: byte {position} ^ {bit:#x}"
    file.write_bytes(original)
    assert verify_manifest(written) is None


def _noticed(folder: Path) -> bool:
    """Tell whether damage is reported, or the manifest still has the same meaning (white space)."""
    problem = verify_manifest(folder)
    if problem is not None:
        return bool(problem.strip()) and "\n" not in problem
    entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return {name: entry["sha256"] for name, entry in entries.items()} == {
        name: sha256_of(folder / name) for name in FILES
    }


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.json", MANIFEST])
def test_every_truncation_is_detected(name: str, written: Path) -> None:
    file = written / name
    original = file.read_bytes()
    for length in range(len(original.rstrip())):
        file.write_bytes(original[:length])
        problem = verify_manifest(written)
        assert problem is not None
        assert name in problem


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\x00")


def becomes_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [Path.unlink, longer, becomes_a_folder])
def test_missing_grown_and_replaced_files_are_named(harm: Callable[[Path], None], name: str, written: Path) -> None:
    harm(written / name)
    problem = verify_manifest(written)
    assert problem is not None
    assert name in problem


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"files"', "{}", '{"files": []}', '{"files": {"state.json": {}}}',
     '{"files": {"state.json": 3}}', '{"files": {"state.json": {"size_bytes": 11}}}'],
)  # fmt: skip
def test_malformed_manifest_is_not_readable(text: str, written: Path) -> None:
    (written / MANIFEST).write_text(text)
    assert verify_manifest(written) == f"{MANIFEST} is not readable"


def test_missing_or_binary_manifest_is_an_error(written: Path) -> None:
    (written / MANIFEST).write_bytes(b"\xff\xfe\x00")
    assert verify_manifest(written) == f"{MANIFEST} is not readable"
    (written / MANIFEST).unlink()
    assert verify_manifest(written) == f"{MANIFEST} is missing"
    shutil.rmtree(written)
    assert verify_manifest(written) == f"{MANIFEST} is missing"


def test_new_manifest_accepts_changed_files(written: Path) -> None:
    (written / "card.md").write_text("more")
    (written / "state.json").write_text("{}")
    assert verify_manifest(written) is not None
    write_manifest(written)
    assert verify_manifest(written) is None


def test_text_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    write_text(file, "old\n")
    write_text(file, "näw\n")
    assert file.read_bytes() == "näw\n".encode()
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "half \ud800")
    assert file.read_bytes() == "näw\n".encode()

    def disk_full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic_io.os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_text(file, "new")
    assert file.read_bytes() == "näw\n".encode()
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"], "no temporary file is left"


def test_sha256_of_a_large_file(tmp_path: Path) -> None:
    import hashlib

    data = bytes(range(256)) * 8192  # two blocks
    (tmp_path / "large").write_bytes(data + b"x")
    assert sha256_of(tmp_path / "large") == hashlib.sha256(data + b"x").hexdigest()


@pytest.mark.parametrize("kind", ["enospc", "perm"])
def test_failed_write_keeps_the_old_text(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "results.json"
    for name in ("writing", "changing"):
        monkeypatch.setattr(atomic_io, name, getattr(fault_points, name))
    for number in (1, 2):
        write_text(file, "old\n")
        monkeypatch.setenv(fault_points.VARIABLE, f"{kind}@{fault_points.num_points() + number}")
        with pytest.raises(OSError, match=r"No space left|Permission denied"):
            write_text(file, "new\n")
        assert file.read_text() == "old\n"
        assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
        monkeypatch.delenv(fault_points.VARIABLE)


def test_stale_files_are_removed_and_a_replaced_folder_restored(written: Path) -> None:
    parent = written.parent
    written.rename(parent / ".step-1.old")
    for name in (".step-1.staging", ".step-3.deleted", ".step-2.old"):
        fill(parent / name)
    fill(parent / "step-2")
    (parent / ".run.json.99.tmp").write_text("half")
    (parent / ".lock").write_text("")
    atomic_io.remove_stale_files(parent)
    assert sorted(path.name for path in parent.iterdir()) == [".lock", "step-1", "step-2"]
    assert verify_manifest(written) is None
