"""The header of a GGUF file: settings, token ids, and names and shapes of tensors."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from qlora_train.architectures.gguf_reader import StoredTensor, TextArray, read_structure
from qlora_train.utils.errors import ModelError

INSTEAD = "use the original safetensors model instead"
_ABSENT = object()
_F32 = 0
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


@dataclass
class GGUFHeader:
    """A header, which records what was read from it, so that nothing is lost in a conversion.

    Attributes:
        files: the file, or all parts of a split one.
        tensors: by name.
        settings: values of the architecture's own keys, without its name.
        tokenizer: values of the keys of `tokenizer.ggml`, without vocabularies.
        chat_template: a Jinja template, None if there is none.
    """

    path: Path
    files: tuple[Path, ...]
    architecture: str
    tensors: Mapping[str, StoredTensor]
    settings: Mapping[str, Any]
    tokenizer: Mapping[str, Any]
    chat_template: str | None
    _all_settings: Mapping[str, Any]
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

    def weights(self) -> dict[str, StoredTensor]:
        """Return the tensors that are not settings."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self._tensors_read}

    def has(self, tensor: str) -> bool:
        """Return whether the file has a tensor."""
        return tensor in self.tensors

    def drop_copy(self, name: str, original: str) -> bool:
        """Leave a tensor out if it is a copy of another; return whether it is."""
        ours, other = self.tensors[name], self.tensors[original]
        num_bytes = min(len(ours.content), len(other.content))  # padding aside
        is_copy = (ours.kind, ours.shape) == (other.kind, other.shape) and np.array_equal(
            ours.content[:num_bytes], other.content[:num_bytes]
        )
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
        return self.tensors[tensor].shape

    def vocabulary(self, key: str) -> Any:
        """Return an array of `tokenizer.ggml`, with an entry per token or merge; None if it is missing."""
        values = self._all_settings.get(f"tokenizer.ggml.{key}")
        return values.decode() if isinstance(values, TextArray) else values

    def values(self, tensor: str) -> list[float]:
        """Return the values of a small tensor that is a setting, in float32."""
        stored = self.tensors[tensor]
        if stored.kind != _F32:
            raise self.refused(f"holds {tensor} in another number format than float32")
        self._tensors_read.add(tensor)
        num_bytes = math.prod(stored.shape) * np.dtype(np.float32).itemsize
        values: list[float] = stored.content[:num_bytes].view("<f4").tolist()
        return values

    def refused(self, reason: str) -> ModelError:
        """Return the error for a file that cannot be converted exactly."""
        return ModelError(f"model.model_name_or_path: {self.path} {reason}; {INSTEAD}")


def read_header(path: Path) -> GGUFHeader:
    """Read the header of a GGUF file, and of the other parts of a split one.

    Raises:
        ModelError: no GGUF file, a damaged one, or a missing part.
    """
    files = parts_of(path)
    structures = [read_structure(file) for file in files]
    settings = structures[0].settings  # the first part has all of them
    architecture = str(settings.get("general.architecture"))
    tokenizer = _below("tokenizer.ggml.", settings)
    return GGUFHeader(
        path=path, files=files, architecture=architecture,
        tensors={name: tensor for structure in structures for name, tensor in structure.tensors.items()},
        settings=_below(f"{architecture}.", settings),
        tokenizer={key: value for key, value in tokenizer.items() if not isinstance(value, list | TextArray)},
        chat_template=settings.get("tokenizer.chat_template"), _all_settings=settings,
    )  # fmt: skip


def parts_of(path: Path) -> tuple[Path, ...]:
    """Return all parts of a split file, by llama.cpp's names, or the file itself.

    Raises:
        ModelError: a part is missing.
    """
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


def _below(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
