"""Read a checkpoint folder: its safetensors files and their tensors, of which none is read before it is needed.

Training, merging and export read the same files in the same way. Pre-quantized weights appear under the names, and with
the values, of the 16-bit weights that they represent.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from qlora_train.utils.errors import ModelError, first_line, listed

if TYPE_CHECKING:
    from qlora_train.models.prequantized import PrequantizedFormat

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""Dtypes of tensors that are not pre-quantized, by their names in safetensors."""
LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored; `dtype` is its name in safetensors."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def find_stored_format(config: Mapping[str, Any], where: str) -> "PrequantizedFormat | None":
    """Return the format of pre-quantized weights; None for 16-bit ones and for bitsandbytes' 4 bits.

    Args:
        config: content of config.json.
        where: prefix of the error message.

    Raises:
        ModelError: an unsupported format.
    """
    stored = config.get("quantization_config")
    if stored is None or stored.get("load_in_4bit"):
        return None
    from qlora_train.models.prequantized import prequantized_format

    return prequantized_format(stored, where)


def list_tensors(folder: Path, where: str) -> dict[str, StoredTensor]:
    """Return every tensor of a checkpoint by name, from the headers of its weight files.

    Args:
        where: prefix of error messages, such as the setting and the base's name.

    Raises:
        ModelError: no weights, two sets of weights, or a file that is missing, damaged or incomplete.
    """
    found: dict[str, StoredTensor] = {}
    for path, indexed in _weight_files(folder, where).items():
        tensors = _read_header(path, where)
        if missing := sorted(indexed - tensors.keys()):
            raise ModelError(
                f"{where}: {path.name} lacks {listed(missing, 3)}, which {INDEX} names; download both files again"
            )
        found |= tensors
    return found


def open_file(path: Path) -> Any:
    """Open a safetensors file as a context manager."""
    # pages of a mapped file ("mmap") stay resident for as long as it is open
    return safe_open(str(path), framework="pt", backend="pread")


@contextmanager
def open_tensors(
    folder: Path, stored_format: "PrequantizedFormat | None", dtype: torch.dtype, where: str
) -> Iterator[dict[str, Any]]:
    """Open a checkpoint and yield lazy tensors by name, each read when `from_pretrained` slices it.

    Args:
        stored_format: of pre-quantized weights; None for all others, including those that bitsandbytes stored.
        dtype: of dequantized weights.
        where: prefix of error messages.

    Raises:
        ModelError: as `list_tensors`, or pre-quantized weights without scales.
    """
    with ExitStack() as stack:
        stored = list_tensors(folder, where)
        files = {path: stack.enter_context(open_file(path)) for path in {each.file for each in stored.values()}}
        slices = {name: files[each.file].get_slice(name) for name, each in stored.items()}
        if stored_format is None:
            yield slices
            return
        try:
            plain, weights = stored_format.split({name: each.dtype for name, each in stored.items()})
        except ModelError as error:
            raise ModelError(f"{where}: {error}") from None
        yield {name: slices[name] for name in plain} | {
            name: Dequantized(f"{where}: {name}", slices[codes], slices[scales], stored_format, dtype)
            for name, (codes, scales) in weights.items()
        }


@dataclass(frozen=True)
class Dequantized:
    """A lazy tensor with the interface of a safetensors slice."""

    where: str
    codes: Any
    scales: Any
    stored_format: "PrequantizedFormat"
    dtype: torch.dtype

    def __getitem__(self, whole: EllipsisType) -> torch.Tensor:
        try:
            return self.stored_format.dequantize(self.codes[whole], self.scales[whole], self.dtype)
        except ModelError as error:
            raise ModelError(f"{self.where}: {error}; download the files again, or use the 16-bit model") from None

    def get_shape(self) -> list[int]:
        return list(self.stored_format.shape(tuple(self.codes.get_shape())))

    def get_dtype(self) -> str:
        return next(name for name, dtype in DTYPES.items() if dtype == self.dtype)


def _weight_files(folder: Path, where: str) -> dict[Path, set[str]]:
    """Return the weight files, each with the tensors that the index names in it (none without an index)."""
    single = folder / WEIGHTS
    if not (folder / INDEX).is_file():
        if not single.is_file():
            raise _no_weights(folder, where)
        return {single: set()}
    files = _indexed_files(folder, where)
    if single.is_file() and single not in files:
        raise ModelError(
            f"{where}: {folder} holds two sets of weights, {WEIGHTS} and the {len(files)} files of {INDEX}; move one of "
            "them out of the folder"
        )
    return files


def _indexed_files(folder: Path, where: str) -> dict[Path, set[str]]:
    files: dict[Path, set[str]] = {}
    try:
        for tensor, file in json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
            files.setdefault(folder / file, set()).add(tensor)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{where}: {INDEX} cannot be read ({type(error).__name__}: {first_line(error)}); download it again"
        ) from None
    if not files:
        raise ModelError(f"{where}: {INDEX} names no tensor; download it again")
    return files


def _no_weights(folder: Path, where: str) -> ModelError:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickles:
        return ModelError(
            f"{where}: {pickles[0]} is a pickle other than pytorch_model.bin, which is not read, and there is no "
            f"{WEIGHTS}; choose a revision with safetensors, or convert it if you trust it (save_pretrained does)"
        )
    return ModelError(f"{where}: {folder} holds neither {WEIGHTS} nor {INDEX}; download the weights")


def _read_header(path: Path, where: str) -> dict[str, StoredTensor]:
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ModelError(
                    f"{where}: {path.name} is a Git LFS pointer and not the weights; run: git lfs pull, in {path.parent}"
                )
        with open_file(path) as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            return {name: StoredTensor(path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except FileNotFoundError:
        raise ModelError(f"{where}: {path.name} is missing, which {INDEX} names; download it") from None
    except (OSError, SafetensorError) as error:
        size = f"{path.stat().st_size:,} bytes" if path.is_file() else "no file"
        raise ModelError(
            f"{where}: {path.name} ({size}) is truncated or damaged: {first_line(error)}; download it again"
        ) from None
