"""The header of a GGUF file: settings, token ids, and names and shapes of tensors.

The package `gguf` reads it without loading the tensors.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qlora_train.utils.errors import ModelError

INSTEAD = "use the original safetensors model instead"
_ABSENT = object()
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass
class GGUFHeader:
    """A header, which records what was read from it, so that nothing is lost in a conversion.

    Attributes:
        files: the file, or all parts of a split one.
        tensors: the memory-mapped tensors of the `gguf` package by name.
        settings: values of the architecture's own keys, without its name.
        tokenizer: values of the keys of `tokenizer.ggml`, without vocabularies.
        chat_template: a Jinja template, None if there is none.
    """

    path: Path
    files: tuple[Path, ...]
    architecture: str
    tensors: Mapping[str, Any]
    settings: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    chat_template: str | None
    _fields: Mapping[str, Any]
    _keys_read: set[str] = field(default_factory=set)
    _tensors_read: set[str] = field(default_factory=set)

    def take(self, key: str, default: Any = _ABSENT) -> Any:
        """Return a setting; a list with one distinct value is that value.

        Raises:
            ModelError: it is missing and has no default, or differs between layers.
        """
        value = self.take_list(key, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.refused(f"sets {self.architecture}.{key}: {value}, which differs between layers")
        return value[0]

    def take_list(self, key: str, default: Any = _ABSENT) -> Any:
        """Return a setting as it is.

        Raises:
            ModelError: it is missing and has no default.
        """
        self._keys_read.add(key)
        value = self.settings.get(key, default)
        if value is _ABSENT:
            raise self.refused(f"has no {self.architecture}.{key}")
        return value

    def unread_settings(self) -> dict[str, Any]:
        """Return the settings that nothing asked for."""
        return {key: value for key, value in self.settings.items() if key not in self._keys_read}

    def weights(self) -> dict[str, Any]:
        """Return the tensors that are not settings."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self._tensors_read}

    def has(self, tensor: str) -> bool:
        """Return whether the file has a tensor."""
        return tensor in self.tensors

    def drop_copy(self, name: str, original: str) -> bool:
        """Leave a tensor out if it is a copy of another; return whether it is."""
        ours, other = self.tensors[name], self.tensors[original]
        is_copy = ours.tensor_type == other.tensor_type and bytes(ours.data.data) == bytes(other.data.data)
        if is_copy:
            self._tensors_read.add(name)
        return is_copy

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return the shape of a tensor, slowest dimension first as in torch.

        Raises:
            ModelError: it is missing.
        """
        if tensor not in self.tensors:
            raise self.refused(f"has no tensor {tensor}")
        return tuple(int(size) for size in reversed(self.tensors[tensor].shape.tolist()))

    def vocabulary(self, key: str) -> Any:
        """Return an array of `tokenizer.ggml`, with an entry per token or merge; None if it is missing."""
        item = self._fields.get(f"tokenizer.ggml.{key}")
        return None if item is None else item.contents()

    def values(self, tensor: str) -> list[float]:
        """Return the values of a small tensor that is a setting."""
        import gguf

        self._tensors_read.add(tensor)
        stored = self.tensors[tensor]
        values: list[float] = gguf.dequantize(stored.data, stored.tensor_type).reshape(-1).tolist()
        return values

    def refused(self, reason: str) -> ModelError:
        """Return the error for a file that cannot be converted exactly."""
        return ModelError(f"model.model_name_or_path: {self.path} {reason}; {INSTEAD}")


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file, and of the other parts of a split one.

    Raises:
        ModelError: no GGUF file, a damaged one, a missing part, or no package `gguf`.
    """
    files = _parts(path)
    readers = [_open(file) for file in files]
    fields = readers[0].fields  # the first part has all settings
    values = {key: item.contents() for key, item in fields.items() if not _is_vocabulary(key, item)}
    architecture = str(values.get("general.architecture"))
    return GGUFHeader(
        path=path, files=files, architecture=architecture,
        tensors={tensor.name: tensor for reader in readers for tensor in reader.tensors},
        settings=_below(f"{architecture}.", values), tokenizer=_below("tokenizer.ggml.", values),
        chat_template=values.get("tokenizer.chat_template"), _fields=fields,
    )  # fmt: skip


def _parts(path: Path) -> tuple[Path, ...]:
    """Return all parts of a split file, by llama.cpp's names, or the file itself."""
    match = _PART.fullmatch(path.name)
    count = int(match[3]) if match else 1
    if match is None or count == 1:
        return (path,)
    parts = tuple(path.with_name(f"{match[1]}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1))
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelError(
            f"model.model_name_or_path: {path} is a part of a split GGUF file, and {len(missing)} of {count} parts are "
            f"missing: {missing[0]}; put all parts into one folder"
        )
    return parts


def _open(file: Path) -> Any:
    _check_file(file)
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(
            f"model.model_name_or_path: {file} is a damaged GGUF file, or newer than the package gguf ({error}); "
            "download it again, or: pip install --upgrade gguf"
        ) from error


def _is_vocabulary(key: str, item: Any) -> bool:
    return key.startswith("tokenizer.ggml.") and len(item.types) > 1  # an array


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}


def _check_file(path: Path) -> None:
    where = f"model.model_name_or_path: {path}"
    if not path.is_file():
        raise ModelError(f"{where} does not exist; set a .gguf file, a model folder or a Hub id")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise ModelError(f"{where} is not a GGUF file: it starts with {magic!r} instead of b'GGUF'; download it again")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{where} needs the package gguf; run: pip install 'qlora-train[gguf]'")
