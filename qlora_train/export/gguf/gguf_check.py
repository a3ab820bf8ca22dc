"""A written GGUF file, opened again and compared with what it was made of.

Names are those of the ``gguf`` package's tables. llama.cpp orders the rows of some matrices (queries and keys of Llama) in
its own way, so the values of a matrix are compared in sorted order; that the order is right is shown by running the
file, which tests do. A weight that overflowed float16 is infinite in the file, and no converter says so.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from qlora_train.architectures import text_config
from qlora_train.utils.errors import ExportError

TOLERANCES: Mapping[str, float] = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 127}
"""Largest difference of a value, relative to the largest value of its matrix, by kind of file."""
NUM_COMPARED = 6
_TOKENIZER = "tokenizer.ggml."
_SPECIAL = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
_ADDED = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
"""What a special and another added token may be: the converter takes some for special by their looks."""
_GUESSED_SCORE = -1000.0
"""What the converter gives every token of a SentencePiece vocabulary whose scores it has not got."""


@dataclass(frozen=True)
class Source:
    """A tensor that the file was made of: its name in Transformers, how to read it, and what the file puts behind it."""

    name: str
    read: Callable[[], torch.Tensor]
    suffix: str = ""


@dataclass(frozen=True)
class GGUFCheck:
    """What was looked at: tensors in the file, those found by name, and those compared value by value."""

    num_tensors: int
    num_named: int
    num_compared: int
    size_bytes: int

    def summary(self) -> str:
        return (
            f"{self.num_tensors} tensors ({self.num_named} found by name), {self.size_bytes / 1e9:.2f} GB; all values "
            f"finite, {self.num_compared} matrices equal to their source within the rounding of the format"
        )


class GGUFFile:
    """A file of the converter's, open for reading."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = gguf.GGUFReader(path)
        self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}

    def setting(self, key: str) -> Any:
        """Return the value of a metadata key; None where there is none."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def adds_bos(self) -> bool:
        """Say whether llama.cpp puts the beginning token before every prompt: as the file says, or by its default."""
        said = self.setting(f"{_TOKENIZER}add_bos_token")
        by_default = self.setting(f"{_TOKENIZER}model") == "llama" or self.setting(f"{_TOKENIZER}pre") == "llama-bpe"
        return by_default if said is None else bool(said)

    def eos(self) -> int | None:
        """Return the token at which a program stops."""
        value = self.setting(f"{_TOKENIZER}eos_token_id")
        return None if value is None else int(value)

    def puts_space_behind_special(self) -> bool | None:
        """Say whether llama.cpp puts a space before text behind a special token; None for other than SentencePiece."""
        if self.setting(f"{_TOKENIZER}model") != "llama":
            return None
        said = self.setting(f"{_TOKENIZER}add_space_prefix")
        return True if said is None else bool(said)

    def check_added_tokens(self, tokenizer: Any) -> None:
        """Compare the text and the type of every added token that the model has with the tokenizer's.

        Raises:
            ExportError: they differ, so that a prompt would become other tokens.
        """
        texts, types = self.setting(f"{_TOKENIZER}tokens"), self.setting(f"{_TOKENIZER}token_type")
        for i, token in tokenizer.added_tokens_decoder.items():
            if i >= len(texts):
                continue
            kind = gguf.TokenType(types[i])
            # llama.cpp looks for user-defined tokens in the text, where spaces are spaces
            contents = {token.content, token.content.replace("\u2581", " ")}
            if texts[i] not in contents or kind not in (_SPECIAL if token.special else _ADDED):
                raise ExportError(
                    f"{self.path.name}: token {i} is {token.content!r} ({'special' if token.special else 'added'}) in the "
                    f"tokenizer, and the converter wrote {texts[i]!r} ({kind.name.lower()}), so that prompts would become "
                    "other tokens; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
                )

    def check_rope_scaling(self, config: Mapping[str, Any]) -> None:
        """Refuse a file without the RoPE scaling of a config: some of the converter's models do not write it.

        Args:
            config: content of config.json.

        Raises:
            ExportError: the model would run with positions that are not scaled.
        """
        content = text_config(config)
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        rope = rope.get("full_attention", rope)
        kind, key = rope.get("rope_type", rope.get("type")), f"{self.setting('general.architecture')}.rope.scaling"
        written = {
            "linear": self.setting(f"{key}.type") == kind and self.setting(f"{key}.factor") == rope.get("factor"),
            "yarn": self.setting(f"{key}.type") == kind and self.setting(f"{key}.factor") == rope.get("factor"),
            "llama3": "rope_freqs.weight" in self._tensors,
        }
        if not written.get(kind, True):
            raise ExportError(
                f"{self.path.name}: the converter does not write the RoPE scaling of this model ({kind}), so that every "
                "position would be another; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp "
                "FOLDER"
            )

    def guesses_merges(self) -> bool:
        """Say whether the vocabulary is SentencePiece's without its scores, so that text becomes other tokens."""
        scores = self.setting(f"{_TOKENIZER}scores")
        return scores is not None and set(scores) == {_GUESSED_SCORE}

    def check(self, sources: Sequence[Source], quant: str) -> GGUFCheck:
        """Compare the file with what it was made of.

        Raises:
            ExportError: a tensor is missing, of another size, not finite or of other values.
        """
        named = [(source, name) for source in sources if (name := self._name(source)) is not None]
        missing = [name for _, name in named if name not in self._tensors]
        if missing or not self._tensors:
            raise ExportError(f"{self.path.name}: {len(missing)} tensors are missing: {missing[:3]}; export again")
        for tensor in self._tensors.values():
            if tensor.data.dtype.kind == "f" and not np.isfinite(tensor.data).all():
                raise ExportError(
                    f"{self.path.name}: {tensor.name} has values that are too large for {quant}; use --quant bf16"
                )
        compared = _spread([pair for pair in named if len(self._tensors[pair[1]].shape) > 1], NUM_COMPARED)
        for source, name in compared:
            self._compare(name, source, quant)
        return GGUFCheck(len(self._tensors), len(named), len(compared), self.path.stat().st_size)

    def _name(self, source: Source) -> str | None:
        architecture = self.setting("general.architecture")
        kind = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), None)
        if kind is None:
            return None
        num_blocks = self.setting(f"{architecture}.block_count") or _num_blocks(self._tensors)
        names = gguf.get_tensor_name_map(kind, num_blocks)
        name: str | None = names.get_name(source.name, try_suffixes=(".weight", ".bias"))
        return None if name is None else name + source.suffix

    def _compare(self, name: str, source: Source, quant: str) -> None:
        tensor = self._tensors[name]
        found = np.sort(gguf.quants.dequantize(tensor.data, tensor.tensor_type), axis=None)
        values = np.sort(source.read().float().numpy(), axis=None)
        if found.size != values.size:
            raise ExportError(
                f"{self.path.name}: {name} has {found.size} values, {source.name} has {values.size}; export again"
            )
        largest = float(np.abs(values).max(initial=0.0))
        if float(np.abs(found - values).max(initial=0.0)) > TOLERANCES[quant] * largest:
            raise ExportError(
                f"{self.path.name}: {name} does not hold the values of {source.name}; use another --quant, and report it"
            )


def _num_blocks(names: Mapping[str, Any]) -> int:
    """Return the number of layers that names like ``blk.7.attn_q.weight`` speak of."""
    return 1 + max((int(name.split(".")[1]) for name in names if name.startswith("blk.")), default=0)


def _spread(items: list[tuple[Source, str]], count: int) -> list[tuple[Source, str]]:
    """Return `count` of them, evenly from first to last."""
    if len(items) <= count:
        return items
    return [items[round(position * (len(items) - 1) / (count - 1))] for position in range(count)]
