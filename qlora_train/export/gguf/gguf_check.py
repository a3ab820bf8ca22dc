"""Read a written GGUF file back and compare it with its source.

Tensor names follow the ``gguf`` package's tables. llama.cpp reorders the rows of some matrices (Llama's queries and keys),
so values are compared sorted; tests run the file to show that the order is right. A weight beyond float16 is infinite in
the file, and the converter does not report it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch

from qlora_train.architectures import text_config
from qlora_train.export.gguf.gguf_quants import QUANTS
from qlora_train.export.gguf.quant_mix import SUPER_BLOCK, MixModel, is_quantized
from qlora_train.utils.errors import ExportError

TOLERANCES: Mapping[str, float] = {"f32": 0.0, "bf16": 2**-8, "f16": 2**-11, "q8_0": 1 / 127}
"""Maximum difference of a value relative to the largest value of its matrix, by number format."""
MAX_ERRORS: Mapping[str, float] = {
    "F32": 0.0, "F16": 2**-10, "Q8_0": 0.05, "Q6_K": 0.1, "Q5_K": 0.2, "Q5_1": 0.2, "Q5_0": 0.2, "Q4_K": 0.35, "Q4_1": 0.35,
    "Q4_0": 0.35, "IQ4_NL": 0.35, "IQ4_XS": 0.35, "Q3_K": 0.5, "Q2_K": 0.7,
}  # fmt: skip
"""Maximum error of a quantized matrix relative to its size (Frobenius norms), about twice that of heavy-tailed random ones.
An unrelated matrix differs by 1.4."""
NUM_COMPARED = 6
MAX_ROWS = 512
"""Rows of a quantized matrix that are compared, spread evenly."""
_TOKENIZER = "tokenizer.ggml."
_SPECIAL = (gguf.TokenType.CONTROL, gguf.TokenType.UNKNOWN)
_ADDED = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
"""Allowed types of a special and another added token; the converter takes some for special by their spelling."""
_GUESSED_SCORE = -1000.0
"""The converter's score for every token of a SentencePiece vocabulary without scores."""


@dataclass(frozen=True)
class Source:
    """A tensor that was converted: its name in Transformers, its reader, and the suffix of its name in the file."""

    name: str
    read: Callable[[], torch.Tensor]
    suffix: str = ""


@dataclass(frozen=True)
class GGUFCheck:
    """Counts of tensors: in the file, found by name, and compared by value."""

    num_tensors: int
    num_named: int
    num_compared: int
    size_bytes: int

    def summary(self) -> str:
        """Return the log line."""
        return (
            f"{self.num_tensors} tensors ({self.num_named} found by name), {self.size_bytes / 1e9:.2f} GB; all values "
            f"finite, {self.num_compared} matrices equal to their source within rounding"
        )


class GGUFFile:
    """A file that the converter wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = gguf.GGUFReader(path)
        self._tensors = {str(tensor.name): tensor for tensor in self._reader.tensors}

    def setting(self, key: str) -> Any:
        """Return the value of a metadata key, None if missing."""
        field = self._reader.get_field(key)
        return None if field is None else field.contents()

    def adds_bos(self) -> bool:
        """Return whether llama.cpp adds the bos token before every prompt."""
        value = self.setting(f"{_TOKENIZER}add_bos_token")
        default = self.setting(f"{_TOKENIZER}model") == "llama" or self.setting(f"{_TOKENIZER}pre") == "llama-bpe"
        return default if value is None else bool(value)

    def eos(self) -> int | None:
        """Return the token at which a program stops."""
        value = self.setting(f"{_TOKENIZER}eos_token_id")
        return None if value is None else int(value)

    def puts_space_behind_special(self) -> bool | None:
        """Return whether llama.cpp inserts a space after a special token; None if the vocabulary is not SentencePiece."""
        if self.setting(f"{_TOKENIZER}model") != "llama":
            return None
        value = self.setting(f"{_TOKENIZER}add_space_prefix")
        return True if value is None else bool(value)

    def guesses_merges(self) -> bool:
        """Return whether it is a SentencePiece vocabulary without scores, which splits text into other tokens."""
        scores = self.setting(f"{_TOKENIZER}scores")
        return scores is not None and set(scores) == {_GUESSED_SCORE}

    def check_added_tokens(self, tokenizer: Any) -> None:
        """Compare text and type of every added token with the tokenizer's.

        Raises:
            ExportError: they differ.
        """
        texts, types = self.setting(f"{_TOKENIZER}tokens"), self.setting(f"{_TOKENIZER}token_type")
        for i, token in tokenizer.added_tokens_decoder.items():
            if i >= len(texts):
                continue
            kind = gguf.TokenType(types[i])
            # llama.cpp looks for user-defined tokens in the text, where spaces are spaces
            allowed = {token.content, token.content.replace("\u2581", " ")}
            if texts[i] not in allowed or kind not in (_SPECIAL if token.special else _ADDED):
                raise ExportError(
                    f"{self.path.name}: token {i} is {token.content!r} ({'special' if token.special else 'added'}) in the "
                    f"tokenizer, but the converter wrote {texts[i]!r} ({kind.name.lower()}), so that prompts would have "
                    "other tokens; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
                )

    def check_rope_scaling(self, config: Mapping[str, Any]) -> None:
        """Refuse a file without the RoPE scaling of a config.json; the converter omits it for some architectures.

        Raises:
            ExportError: it is missing.
        """
        content = text_config(config)
        rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
        rope = rope.get("full_attention", rope)
        kind, key = rope.get("rope_type", rope.get("type")), f"{self.setting('general.architecture')}.rope.scaling"
        has_factor = self.setting(f"{key}.type") == kind and self.setting(f"{key}.factor") == rope.get("factor")
        written = {"linear": has_factor, "yarn": has_factor, "llama3": "rope_freqs.weight" in self._tensors}
        if not written.get(kind, True):
            raise ExportError(
                f"{self.path.name}: the converter does not write the RoPE scaling of this model ({kind}); use the folder "
                "with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
            )

    def check(self, sources: Sequence[Source], quant: str) -> GGUFCheck:
        """Compare the file with the tensors that were converted.

        Raises:
            ExportError: a tensor is missing, not finite, or of another size or other values.
        """
        named = [(source, name) for source in sources if (name := self._name(source)) is not None]
        missing = [name for _, name in named if name not in self._tensors]
        if missing:
            raise ExportError(f"{self.path.name}: {len(missing)} tensors are missing: {missing[:3]}; export again")
        for tensor in self._tensors.values():
            if tensor.data.dtype.kind == "f" and not np.isfinite(tensor.data).all():
                raise ExportError(
                    f"{self.path.name}: {tensor.name} has values that are too large for {quant}; use --quant bf16"
                )
        matrices = [pair for pair in named if len(self._tensors[pair[1]].shape) > 1]
        spread = sorted({round(position) for position in np.linspace(0, len(matrices) - 1, NUM_COMPARED)})
        compared = [matrices[index] for index in spread] if matrices else []
        for source, name in compared:
            self._compare(name, source, quant)
        return GGUFCheck(len(self._tensors), len(named), len(compared), self.path.stat().st_size)

    def mix_model(self) -> MixModel:
        """Return what llama.cpp's mixes depend on."""
        architecture = self.setting("general.architecture")

        def first(key: str, default: int = 0) -> int:
            value = self.setting(f"{architecture}.{key}")
            return default if value is None else int(value[0] if isinstance(value, list) else value)

        num_heads = first("attention.head_count")
        return MixModel(
            architecture,
            first("block_count"),
            num_heads,
            first("attention.head_count_kv", num_heads),
            first("expert_count"),
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor, the row length first."""
        return {name: tuple(int(length) for length in tensor.shape) for name, tensor in self._tensors.items()}

    def count_types(self) -> dict[str, int]:
        """Return the number of tensors of each type, the most frequent first."""
        return dict(Counter(tensor.tensor_type.name for tensor in self._tensors.values()).most_common())

    def check_quantized(self, source: "GGUFFile", quant: str) -> str:
        """Compare the file with the one that it was quantized from, and return the log line.

        Raises:
            ExportError: it states another format, or a tensor is missing, of another size or not near its source.
        """
        actual, expected = self.shapes(), source.shapes()
        if self.setting("general.file_type") != QUANTS[quant].file_type or actual != expected:
            raise ExportError(f"{self.path.name}: llama.cpp did not write {quant} of the same tensors; upgrade it")
        converted = [name for name, shape in actual.items() if is_quantized(name, shape)]
        compared = (
            [converted[round(at)] for at in np.linspace(0, len(converted) - 1, NUM_COMPARED)] if converted else []
        )
        for name in dict.fromkeys(compared):
            self._compare_rows(source, name)
        narrow = sum(actual[name][0] % SUPER_BLOCK != 0 for name in converted)
        types = ", ".join(f"{count} {kind}" for kind, count in self.count_types().items())
        why = (
            f"; {narrow} of {len(converted)} matrices have rows that are no multiple of {SUPER_BLOCK}" if narrow else ""
        )
        return f"{self.path.stat().st_size / 1e9:.2f} GB; {types}{why}"

    def _compare_rows(self, source: "GGUFFile", name: str) -> None:
        tensor = self._tensors[name]
        actual, expected = (_some_rows(file._tensors[name]) for file in (self, source))
        error, norm = float(np.linalg.norm(actual - expected)), float(np.linalg.norm(expected))
        if not error <= MAX_ERRORS[tensor.tensor_type.name] * norm:
            raise ExportError(
                f"{self.path.name}: {name} differs by {error / norm:.2f} of its size from the {tensor.tensor_type.name} of "
                "its source; use another --quant, and report it"
            )

    def _name(self, source: Source) -> str | None:
        architecture = self.setting("general.architecture")
        kind = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture), None)
        if kind is None:
            return None
        blocks = [int(name.split(".")[1]) for name in self._tensors if name.startswith("blk.")]
        num_blocks = self.setting(f"{architecture}.block_count") or 1 + max(blocks, default=0)
        names = gguf.get_tensor_name_map(kind, num_blocks)
        name: str | None = names.get_name(source.name, try_suffixes=(".weight", ".bias"))
        return None if name is None else name + source.suffix

    def _compare(self, name: str, source: Source, quant: str) -> None:
        tensor = self._tensors[name]
        actual = np.sort(gguf.quants.dequantize(tensor.data, tensor.tensor_type), axis=None)
        expected = np.sort(source.read().float().numpy(), axis=None)
        if actual.size != expected.size:
            raise ExportError(
                f"{self.path.name}: {name} has {actual.size} values, {source.name} has {expected.size}; export again"
            )
        largest = float(np.abs(expected).max(initial=0.0))
        if float(np.abs(actual - expected).max(initial=0.0)) > TOLERANCES[quant] * largest:
            raise ExportError(
                f"{self.path.name}: {name} does not hold the values of {source.name}; use another --quant, and report it"
            )


def _some_rows(tensor: gguf.ReaderTensor) -> npt.NDArray[np.float32]:
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    chosen = rows[:: max(1, len(rows) // MAX_ROWS)]
    values: npt.NDArray[np.float32] = gguf.quants.dequantize(chosen, tensor.tensor_type)
    return values
