"""Read the structure of a GGUF file: settings, and name, shape and place of each tensor.

The reader of the package `gguf` makes several objects per token, which takes half a minute for the vocabulary of Gemma 3.
Arrays of texts are skipped here, and decoded when they are asked for. Format: docs/gguf.md of ggml.
"""

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qlora_train.utils.errors import ModelError

Bytes = npt.NDArray[np.uint8]
MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Type of a value -> its code in `struct` and numpy."""
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
_MAX_DIMENSIONS = 8
_DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TextArray:
    """An array of texts, which are decoded on demand."""

    content: mmap.mmap
    start: int
    count: int

    def decode(self) -> list[str]:
        """Return the texts."""
        cursor = _Cursor(self.content, self.start)
        return [cursor.text() for _ in range(self.count)]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file.

    Attributes:
        shape: slowest dimension first, as in torch.
        kind: number of its number format, a `gguf.GGMLQuantizationType`.
        content: its bytes, memory-mapped, and padding.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    content: Bytes

    def rows(self) -> Bytes:
        """Return its bytes, (rows, bytes per row).

        Raises:
            ValueError: an unknown number format, or the file ends before.
        """
        import gguf

        block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(self.kind)]
        if self.shape[-1] % block_size:
            raise ValueError(f"rows of {self.name} are no whole number of blocks")
        row_bytes = self.shape[-1] // block_size * block_bytes
        num_rows = prod(self.shape[:-1])
        if num_rows * row_bytes > len(self.content):
            raise ValueError(f"it ends within {self.name}")
        return self.content[: num_rows * row_bytes].reshape(num_rows, row_bytes)


@dataclass(frozen=True)
class Structure:
    """What a file holds: settings by key, long texts undecoded, and its tensors."""

    settings: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]


class _Cursor:
    def __init__(self, content: mmap.mmap, position: int = 0) -> None:
        self._content, self.position = content, position

    def scalar(self, code: str) -> Any:
        value = struct.unpack_from(f"<{code}", self._content, self.position)[0]
        self.position += struct.calcsize(f"<{code}")
        return value

    def text(self) -> str:
        return self._bytes(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        if kind == _FLOAT32:
            return float(str(np.float32(self.scalar("f"))))  # 1e-06 instead of 9.999999974752427e-07
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of type {kind}")
        return self._array(self.scalar("I"), self.scalar("Q"))

    def _array(self, kind: int, count: int) -> Any:
        if kind in _SCALARS:
            code = np.dtype(f"<{_SCALARS[kind]}" if _SCALARS[kind] != "?" else "?")
            return np.frombuffer(self._bytes(count * code.itemsize), code).tolist()
        if kind != _TEXT:
            raise ValueError(f"an array of type {kind}")
        array = TextArray(self._content, self.position, count)
        for _ in range(count):
            self._skip(self.scalar("Q"))
        return array

    def _bytes(self, count: int) -> bytes:
        start = self.position
        self._skip(count)
        return self._content[start : self.position]

    def _skip(self, count: int) -> None:
        self.position += count
        if self.position > len(self._content):
            raise ValueError("it ends within a value")


def check_magic(path: Path) -> None:
    """Raise a ModelError if a file does not exist or is no GGUF file."""
    where = f"model.model_name_or_path: {path}"
    if not path.is_file():
        raise ModelError(f"{where} does not exist; set a .gguf file, a model folder or a Hub id")
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
    if magic != MAGIC:
        raise ModelError(
            f"{where} is not a GGUF file: it starts with {magic!r} instead of {MAGIC!r}; download it again"
        )


def read_structure(path: Path) -> Structure:
    """Read a file up to its tensors.

    Raises:
        ModelError: it does not exist, is no GGUF file, or is damaged.
    """
    check_magic(path)
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    try:
        return _parse(content)
    except (struct.error, TypeError, ValueError, OverflowError) as error:
        raise ModelError(
            f"model.model_name_or_path: {path} is a damaged GGUF file ({error}); download it again"
        ) from None


def _parse(content: mmap.mmap) -> Structure:
    cursor = _Cursor(content, len(MAGIC))
    if (version := cursor.scalar("I")) not in _VERSIONS:
        raise ValueError(f"version {version}, where {' and '.join(map(str, _VERSIONS))} are read")
    num_tensors, num_settings = cursor.scalar("Q"), cursor.scalar("Q")
    settings: dict[str, Any] = {}
    for _ in range(num_settings):
        key = cursor.text()
        settings[key] = cursor.value(cursor.scalar("I"))
    places = [_tensor(cursor) for _ in range(num_tensors)]
    alignment = int(settings.get("general.alignment", _DEFAULT_ALIGNMENT)) or _DEFAULT_ALIGNMENT
    start = -(-cursor.position // alignment) * alignment
    file = np.frombuffer(content, np.uint8)
    offsets = sorted({offset for *_, offset in places})
    ends = dict(pairwise([*offsets, len(file) - start]))
    if offsets and start + offsets[-1] > len(file):
        raise ValueError("it ends before its last tensor")
    tensors = {
        name: StoredTensor(name, shape, kind, file[start + offset : start + ends[offset]])
        for name, shape, kind, offset in places
    }
    return Structure(settings, tensors)


def _tensor(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, num_dimensions = cursor.text(), cursor.scalar("I")
    if not 0 < num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"{name!r} has {num_dimensions} dimensions")
    sizes = [cursor.scalar("Q") for _ in range(num_dimensions)]  # the fastest first
    return name, tuple(reversed(sizes)), cursor.scalar("I"), cursor.scalar("Q")
