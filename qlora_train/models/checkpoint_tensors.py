"""The tensors of a checkpoint by name, each read when it is asked for and not before.

Transformers takes such a mapping in place of files: it slices a tensor with `[...]` when its turn comes, quantises it and
lets it go. Two things follow from handing it over open. Files are read and not mapped, so that what was read does not
stay in the memory of the process, as the pages of a mapped file do until it is closed. And weights that a release
stores in 8 or 4 bits appear under the names, and as the values, of the 16-bit weights they stand for, so that all after it
knows them as nothing else.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import Any

import torch
from safetensors import safe_open

from qlora_train.models.malloc_trim import MemoryTrimmer
from qlora_train.models.prequantized import Parts, PrequantizedFormat
from qlora_train.models.weight_files import weight_files
from qlora_train.utils.errors import ModelError

SAFETENSORS_DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


@dataclass(frozen=True)
class Stored:
    """A tensor of a file, read whenever it is sliced."""

    part: Any
    memory: MemoryTrimmer

    def __getitem__(self, whole: EllipsisType) -> torch.Tensor:
        return self.memory.count(self.part[whole])

    def get_shape(self) -> list[int]:
        """Return its shape."""
        shape: list[int] = self.part.get_shape()
        return shape

    def get_dtype(self) -> str:
        """Return its dtype in the words of safetensors."""
        dtype: str = self.part.get_dtype()
        return dtype


@dataclass(frozen=True)
class Dequantized:
    """A weight of a release, multiplied out whenever it is sliced; it answers as a slice of safetensors does."""

    name: str
    codes: Any
    scales: Any
    release: PrequantizedFormat
    dtype: torch.dtype

    def __getitem__(self, whole: EllipsisType) -> torch.Tensor:
        try:
            return self.release.dequantize(self.codes[whole], self.scales[whole], self.dtype)
        except ModelError as error:
            raise ModelError(f"{self.name}: {error}; fetch the files again, or give the 16-bit model") from None

    def get_shape(self) -> list[int]:
        """Return the shape of the weight."""
        return list(self.release.shape(tuple(self.codes.get_shape())))

    def get_dtype(self) -> str:
        """Return the dtype of the weight in the words of safetensors."""
        return SAFETENSORS_DTYPES[self.dtype]


@contextmanager
def open_tensors(
    folder: Path, release: PrequantizedFormat | None, dtype: torch.dtype, where: str
) -> Iterator[dict[str, Any]]:
    """Open a checkpoint's files and yield a slice for each tensor by name; nothing is read before it is sliced.

    Args:
        folder: the base on disk.
        release: how its weights are stored; None for plain ones, and for those that bitsandbytes stored.
        dtype: of the weights that are multiplied out.
        where: begins every message: the setting and the base's name.

    Raises:
        ModelError: the release lacks scales.
    """
    with ExitStack() as files:
        slices: dict[str, Any] = {}
        memory = MemoryTrimmer()
        for path in weight_files(folder, where):
            # "pread" and not "mmap": pages of a mapped file stay resident for as long as it is open
            file = files.enter_context(safe_open(str(path), framework="pt", backend="pread"))
            slices |= {name: Stored(file.get_slice(name), memory) for name in file.keys()}  # noqa: SIM118 - no mapping
        yield slices if release is None else _as_16bit(slices, release, dtype, where)


def _as_16bit(slices: dict[str, Any], release: PrequantizedFormat, dtype: torch.dtype, where: str) -> dict[str, Any]:
    try:
        parts = release.parts({name: part.get_dtype() for name, part in slices.items()})
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    plain = {name: slices[name] for name in plain_tensors(slices, release, parts)}
    weights = {
        name: Dequantized(f"{where}: {name}", slices[codes], slices[scales], release, dtype)
        for name, (codes, scales) in parts.items()
    }
    return plain | weights


def plain_tensors(names: Mapping[str, Any], release: PrequantizedFormat, parts: Mapping[str, Parts]) -> list[str]:
    """Return the names of tensors that stand for themselves: neither codes nor scales, nor anything unused."""
    used = {part for pair in parts.values() for part in pair}
    return [name for name in names if name not in used and not name.endswith(release.unused)]
