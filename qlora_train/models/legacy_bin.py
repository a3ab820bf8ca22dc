"""Legacy .bin weights (`pytorch_model.bin`) as a base: converted once into a local folder of safetensors.

A pickle can run code when it is loaded. torch's restricted unpickler (`weights_only`) knows tensors and plain containers
and refuses everything else before any code runs.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qlora_train.models.checkpoint_tensors import DTYPES
from qlora_train.models.conversion_cache import SHARD_BYTES, convert_once
from qlora_train.models.shard_writer import write_shards
from qlora_train.utils.atomic_io import sha256_of
from qlora_train.utils.errors import ModelError, first_line

SINGLE, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
AUXILIARY_FILES = (
    "*.json", "*.jinja", "*.model", "tokenizer*", "vocab*", "merges*", "*.py", "additional_chat_templates/*.jinja",
)  # fmt: skip


def convert_legacy_bin(folder: Path, cache_dir: Path, where: str) -> Path:
    """Return a cached folder with the same model in safetensors, converting it if necessary.

    Args:
        folder: holds `pytorch_model.bin`, or shards with their index.
        cache_dir: holds converted models by the sha256 of all their files.
        where: prefix of error messages.

    Raises:
        ModelError: files that are missing or damaged, or that hold anything but tensors by name.
    """
    weights = _weights(folder, where)
    auxiliary = sorted(
        {path for pattern in AUXILIARY_FILES for path in folder.glob(pattern) if path.is_file()} - {folder / INDEX}
    )
    digest = sha256()
    for path in (*weights, *auxiliary):
        digest.update(f"{path.relative_to(folder)} {sha256_of(path)}".encode())

    def convert(staging: Path) -> None:
        for path in auxiliary:
            copy = staging / path.relative_to(folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        files: dict[str, Path] = {}
        sizes: dict[str, int] = {}
        for path in weights:
            for name, size in _sizes(path, where).items():
                files[name], sizes[name] = path, size  # of a name in several files the last counts
        names = [name for path in weights for name in files if files[name] == path]
        write_shards(staging, names, [sizes[name] for name in names], SHARD_BYTES, _tensors(weights, files, where))

    converted = cache_dir / f"{folder.resolve().name}-{digest.hexdigest()[:16]}"
    return convert_once(converted, weights[0].name, convert)


def _weights(folder: Path, where: str) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / SINGLE]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{where}: {INDEX} cannot be read ({first_line(error)}); download it again") from None
    wrong = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if not names or wrong:
        problem = f"names no file of this folder ({wrong[0]})" if wrong else "names no tensor"
        raise ModelError(f"{where}: {INDEX} {problem}; download the weights again")
    return [folder / name for name in names]


def _sizes(path: Path, where: str) -> dict[str, int]:
    return {name: tensor.nbytes for name, tensor in _read(path, where).items()}


def _tensors(weights: list[Path], files: dict[str, Path], where: str) -> Iterator[Tensor]:
    """Yield the tensors file by file, so that only one file is open at a time."""
    for path in weights:
        content = _read(path, where)
        for name in [name for name in files if files[name] == path]:
            yield content.pop(name).clone()  # safetensors refuses tensors that share memory, such as tied ones
        del content  # before the next file is read


def _read(path: Path, where: str) -> dict[str, Tensor]:
    """Return the tensors of one file by name, memory-mapped if it is a zip file."""
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # untrusted bytes: the unpickler can fail in any way
        raise ModelError(
            f"{where}: {path.name} cannot be read as tensors alone ({first_line(error)}), and code in it is never run; "
            "choose a revision with safetensors, or convert it if you trust it (save_pretrained does)"
        ) from None
    if not isinstance(content, dict) or not content:
        raise ModelError(f"{where}: {path.name} holds no tensors by name; use the file that save_pretrained wrote")
    for name, value in content.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ModelError(
                f"{where}: {path.name} holds {str(name)!r}, which is no plain tensor; use the file that save_pretrained "
                "wrote"
            )
    return {name: tensor.detach() for name, tensor in content.items()}


def _is_plain(value: object) -> bool:
    if not isinstance(value, Tensor) or value.is_quantized:
        return False
    return value.layout == torch.strided and value.dtype in DTYPES.values()
