"""The base checkpoint on disk: one tensor at a time, dequantised where it is stored in 4 or 8 bits.

Reading files instead of a loaded model is deliberate: on some CPUs bitsandbytes repacks the 4-bit weights of a live
model in place at its first evaluation, and what is dequantised from those afterwards is noise.

One file is open at a time: the pages of a file that was read count as memory of the process for as long as it is open.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from bitsandbytes.functional import QuantState, quantize_4bit

from qlora_train.config.schema import QuantizationSection
from qlora_train.kernels.ops.dequantize import by_bitsandbytes
from qlora_train.models.checkpoint_tensors import DTYPES, StoredTensor, list_tensors, open_file
from qlora_train.models.prequantized import Parts, PrequantizedFormat, prequantized_format
from qlora_train.utils.errors import MergeError, ModelError

BLOCK_SIZE = 64
"""Weights that share one scale: bitsandbytes' block size for 4-bit linear layers."""
_STATE = ".quant_state.bitsandbytes__"
_STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FOREIGN = (".SCB", ".qweight", ".weight_scale", ".weight_scale_inv", "_blocks")
"""Ends of names in quantised formats, which none of the tensors has that are read."""


class BaseCheckpoint:
    """The tensors of a checkpoint folder by name; a context manager that closes the file that is open.

    Args:
        folder: the base.
        dtype: of the weights of a release in FP8 or MXFP4, which are those that a run quantised from.

    Attributes:
        names: tensors of the model, without the side tensors of quantised ones.
        stored_4bit: the names of those that bitsandbytes stored in 4 bits.

    Raises:
        MergeError: no safetensors there, or stored in a quantised form that is not read.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        self.folder = folder
        self._released_dtype = dtype
        self._open: tuple[Path, Any] | None = None
        self._tensors = _list_tensors(folder)
        self._state_key = {key.partition(_STATE)[0]: key for key in self._tensors if _STATE in key}
        self.stored_4bit = frozenset(self._state_key)
        self._turned: frozenset[str] = frozenset()
        self._stored_format, plain, self._parts = _prequantized(folder, self._tensors)
        self.names = (*(key for key in plain if not self._is_side_tensor(key)), *self._parts)
        foreign = [key for key in self.names if key.endswith(_FOREIGN)]
        if foreign:
            raise MergeError(
                f"{folder}: {foreign[0]} belongs to a quantised format that the merge cannot read exactly; "
                "give the 16-bit checkpoint"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def turn(self, names: frozenset[str]) -> None:
        """Say which tensors are of layers stored as (in, out): bitsandbytes stores those as (out, in) in 4 bits."""
        self._turned = names & self.stored_4bit

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; that of a quantised one is its dequantised shape."""
        if self._stored_format is not None and name in self._parts:
            return self._stored_format.shape(self._tensors[self._parts[name][0]].shape)
        if name not in self.stored_4bit:
            return self._tensors[name].shape
        shape = tuple(self._quant_state(name).shape)
        return shape[::-1] if name in self._turned else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of what `read` returns.

        Raises:
            MergeError: it is stored in a format that the merge does not know.
        """
        if name in self.stored_4bit:
            return self._quant_state(name).dtype
        if name in self._parts:
            return self._released_dtype
        stored = self._tensors[name].dtype
        if stored not in DTYPES:
            raise MergeError(
                f"{self.folder}: {name} is stored as {stored}, which the merge does not read; give 16 bits"
            )
        return DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype, quantised ones dequantised."""
        if self._stored_format is not None and name in self._parts:
            codes, scales = (self._stored(part) for part in self._parts[name])
            return self._stored_format.dequantize(codes, scales, self._released_dtype)
        if name not in self.stored_4bit:
            return self._stored(name)
        weight = by_bitsandbytes(self._file(name).get_tensor(name), self._quant_state(name))
        return weight.T.contiguous() if name in self._turned else weight

    def _stored(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file(key).get_tensor(key)
        return tensor

    def _file(self, key: str) -> Any:
        file = self._tensors[key].file
        if self._open is None or self._open[0] != file:
            self._close()
            self._open = file, open_file(file).__enter__()
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def _is_side_tensor(self, key: str) -> bool:
        return _STATE in key or any(key.endswith(p) and key.removesuffix(p) in self.stored_4bit for p in _STATE_PARTS)

    def _quant_state(self, name: str) -> QuantState:
        parts = [name + part for part in _STATE_PARTS if name + part in self._tensors] + [self._state_key[name]]
        return QuantState.from_dict({k: self._file(k).get_tensor(k) for k in parts}, device=torch.device("cpu"))


def _list_tensors(folder: Path) -> dict[str, StoredTensor]:
    try:
        return list_tensors(folder, str(folder))
    except ModelError as error:
        raise MergeError(str(error)) from None


def _prequantized(
    folder: Path, tensors: Mapping[str, StoredTensor]
) -> tuple[PrequantizedFormat | None, list[str], dict[str, Parts]]:
    """Return the format of a pre-quantized checkpoint, its plain tensors, and the parts of each quantized weight."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        stored_format = prequantized_format(config, str(folder))
        if stored_format is None:
            return None, list(tensors), {}
        return stored_format, *stored_format.split({name: each.dtype for name, each in tensors.items()})
    except ModelError as error:
        raise MergeError(str(error)) from None


@dataclass(frozen=True)
class Rounding:
    """Rounding of matrices through 4 bits, as a load in `load_dtype` holds them; computed on `device`.

    Attributes:
        names: of the parameters that the run held so.
        turned: those of them that bitsandbytes holds as the transpose of what is stored.
    """

    names: frozenset[str]
    turned: frozenset[str]
    quantization: QuantizationSection
    load_dtype: torch.dtype
    device: str

    def __call__(self, name: str, matrix: torch.Tensor) -> torch.Tensor:
        """Return a matrix of a parameter quantised in blocks of 64 and back, or as it is when it was not held so."""
        if name not in self.names:
            return matrix
        if name in self.turned:
            return self._rounded(matrix.T).T
        return self._rounded(matrix)

    def _rounded(self, matrix: torch.Tensor) -> torch.Tensor:
        codes, state = quantize_4bit(
            matrix.to(self.device, self.load_dtype).contiguous(),
            blocksize=BLOCK_SIZE,
            compress_statistics=self.quantization.bnb_4bit_use_double_quant,
            quant_type=self.quantization.bnb_4bit_quant_type,
        )
        return by_bitsandbytes(codes, state).to("cpu")
