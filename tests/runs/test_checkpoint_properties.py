"""Any damage to a folder's files is detected; some complete checkpoint always stays."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io

NAMES = st.text("abcXYZ0._- é", min_size=1, max_size=6).filter(
    lambda name: name.strip(". ") != "" and name != atomic_io.MANIFEST
)
TREES = st.dictionaries(st.tuples(NAMES) | st.tuples(NAMES, NAMES), st.binary(max_size=40), min_size=1, max_size=6)
"""Contents by path; a path of two names is in a folder."""


ABOUT = {"run_id": "0f", "step": 3}
"""Manifest metadata; its reader compares it with the expected one, as `RunFolder.checkpoint_problem` does."""


def write_tree(folder: Path, tree: dict[tuple[str, ...], bytes]) -> list[Path]:
    """Write the files and return their paths in the folder."""
    for names, content in tree.items():
        path = folder.joinpath(*names)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return [Path(*names) for names in tree]


def fits_a_disk(tree: dict[tuple[str, ...], bytes]) -> bool:
    """Return whether no name is both a file and a folder, also on case-insensitive disks."""
    files = {names[0].lower() for names in tree if len(names) == 1}
    folders = {names[0].lower() for names in tree if len(names) == 2}
    lower = {tuple(name.lower() for name in names) for names in tree}
    return not files & folders and len(lower) == len(tree)


def truncate(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    file = folder / draw(st.sampled_from(files))
    content = file.read_bytes()
    assume(content)
    file.write_bytes(content[: draw(st.integers(0, len(content) - 1))])


def flip_a_bit(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    file = folder / draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    assume(content)
    content[draw(st.integers(0, len(content) - 1))] ^= 1 << draw(st.integers(0, 7))
    file.write_bytes(content)


def extend(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    with (folder / draw(st.sampled_from(files))).open("ab") as file:
        file.write(draw(st.binary(min_size=1, max_size=5)))


def delete(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    (folder / draw(st.sampled_from(files))).unlink()


def rename(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    file = folder / draw(st.sampled_from(files))
    file.rename(file.with_name(file.name + ".renamed"))


def swap(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    one, other = (folder / draw(st.sampled_from(files)) for _ in range(2))
    contents = one.read_bytes(), other.read_bytes()
    assume(contents[0] != contents[1])
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def replace_by_a_folder(folder: Path, files: list[Path], draw: Callable[..., Any]) -> None:
    file = folder / draw(st.sampled_from(files))
    file.unlink()
    file.mkdir()


def fail() -> None:
    raise InterruptedError


DAMAGES = [truncate, flip_a_bit, extend, delete, rename, swap, replace_by_a_folder]
THOROUGH = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@THOROUGH
@given(st.data(), TREES.filter(fits_a_disk), st.sampled_from(DAMAGES))
def test_every_damage_to_a_file_or_to_the_manifest_is_seen(
    data: st.DataObject, tree: dict[tuple[str, ...], bytes], spoil: Callable[..., None]
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        with atomic_io.atomic_folder(folder, ABOUT) as staging:
            files = write_tree(staging, tree)
        assert atomic_io.verify_manifest(folder) is None
        assert atomic_io.read_metadata(folder) == ABOUT
        assert all((folder / Path(*names)).read_bytes() == content for names, content in tree.items())
        spoil(folder, [*files, Path(atomic_io.MANIFEST)], data.draw)
        assert atomic_io.verify_manifest(folder) is not None or atomic_io.read_metadata(folder) != ABOUT


@settings(max_examples=50, deadline=None)
@given(TREES.filter(fits_a_disk), st.binary(max_size=10))
def test_a_file_that_was_added_is_no_damage(tree: dict[tuple[str, ...], bytes], content: bytes) -> None:
    """Additional files beside those of the manifest are not damage."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        with atomic_io.atomic_folder(folder) as staging:
            write_tree(staging, tree)
        (folder / "another file.txt").write_bytes(content)
        assert atomic_io.verify_manifest(folder) is None


@settings(max_examples=100, deadline=None)
@given(TREES.filter(fits_a_disk), TREES.filter(fits_a_disk), st.booleans())
def test_a_folder_is_replaced_by_the_new_one_or_stays_the_old_one(
    old: dict[tuple[str, ...], bytes], new: dict[tuple[str, ...], bytes], fails: bool
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "folder"
        with atomic_io.atomic_folder(folder) as staging:
            write_tree(staging, old)
        try:
            with atomic_io.atomic_folder(folder) as staging:
                write_tree(staging, new)
                if fails:
                    fail()
        except InterruptedError:
            pass
        assert atomic_io.verify_manifest(folder) is None
        wanted = {Path(*names): content for names, content in (old if fails else new).items()}
        found = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        del found[Path(atomic_io.MANIFEST)]
        assert found == wanted
        assert list(folder.parent.iterdir()) == [folder]


class Rotation(RuleBasedStateMachine):
    """Checkpoints that are saved, damaged, lost and rotated in any order.

    `whole` maps the steps of undamaged checkpoints to the content that was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self._temporary = tempfile.TemporaryDirectory()
        self.run = RunFolder(Path(self._temporary.name))
        self.whole: dict[int, bytes] = {}
        self.damaged: set[int] = set()
        self.best: int | None = None
        self.step = 0

    def teardown(self) -> None:
        self._temporary.cleanup()

    @initialize(content=st.binary(min_size=1, max_size=20))
    def begin(self, content: bytes) -> None:
        self.save(content, 1)

    @rule(content=st.binary(min_size=1, max_size=20), steps=st.integers(1, 3))
    def save(self, content: bytes, steps: int) -> None:
        self.step += steps
        with atomic_io.atomic_folder(self.run.checkpoint(self.step), self.run.checkpoint_metadata(self.step)) as folder:
            (folder / "adapter.safetensors").write_bytes(content)
            (folder / "loop.json").write_text("{}")
        self.whole[self.step] = content

    @precondition(lambda self: self.whole)
    @rule(data=st.data(), how=st.sampled_from(["truncate", "flip", "manifest", "file", "all"]))
    def damage(self, data: st.DataObject, how: str) -> None:
        step = data.draw(st.sampled_from(sorted(self.whole)))
        folder = self.run.checkpoint(step)
        file = folder / "adapter.safetensors"
        content = self.whole.pop(step)
        if how == "all":
            shutil.rmtree(folder)
            return
        self.damaged.add(step)
        if how == "truncate":
            file.write_bytes(content[:-1])
        elif how == "flip":
            file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
        else:
            (folder / atomic_io.MANIFEST if how == "manifest" else file).unlink()

    @precondition(lambda self: self.whole)
    @rule(data=st.data())
    def find_a_best(self, data: st.DataObject) -> None:
        self.best = data.draw(st.sampled_from(sorted(self.whole)))

    @rule(keep=st.integers(1, 4))
    def rotate(self, keep: int) -> None:
        newest = sorted(self.whole)[-keep:]
        self.run.rotate(keep=keep, best=self.best)
        stays = {step: content for step, content in self.whole.items() if step in newest or step == self.best}
        gone = self.whole.keys() - stays.keys()
        assert set(self.run.checkpoint_steps()) == stays.keys() | self.damaged, "whole older ones go, nothing else"
        assert all(step < min(newest) for step in gone)
        self.whole = stays

    @invariant()
    def what_is_whole_is_there_as_it_was_written(self) -> None:
        for step, content in self.whole.items():
            assert atomic_io.verify_manifest(self.run.checkpoint(step)) is None
            assert (self.run.checkpoint(step) / "adapter.safetensors").read_bytes() == content

    @invariant()
    def the_newest_whole_one_is_gone_on_from(self) -> None:
        expected = self.run.checkpoint(max(self.whole)) if self.whole else None
        assert self.run.latest_checkpoint() == expected

    @invariant()
    def nothing_half_done_is_left(self) -> None:
        if self.run.checkpoints.is_dir():
            assert all(path.name.startswith("step-") for path in self.run.checkpoints.iterdir())


TestRotation = Rotation.TestCase
TestRotation.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
