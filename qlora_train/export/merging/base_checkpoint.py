"""Read the base checkpoint one tensor at a time, dequantized if it is stored in 4 or 8 bits.

Files are read instead of a loaded model, since on some CPUs bitsandbytes repacks the 4-bit weights of a live model in place
at its first evaluation, and dequantizing those gives noise.
"""

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from bitsandbytes.functional import QuantState

from qlora_train.kernels.ops.dequantize import by_bitsandbytes
from qlora_train.models.checkpoint_tensors import DTYPES, find_stored_format, open_tensors
from qlora_train.utils.errors import MergeError, ModelError

_STATE = ".quant_state.bitsandbytes__"
_STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")


class BaseCheckpoint(ExitStack):
    """The tensors of a checkpoint folder by name; a context manager that closes its files.

    Args:
        folder: the base.
        dtype: of dequantized FP8 and MXFP4 weights.

    Attributes:
        names: tensors of the model, without the quantization state of bitsandbytes.
        stored_4bit: those that bitsandbytes stored in 4 bits.

    Raises:
        MergeError: no safetensors, or an unknown or damaged quantized format.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.folder = folder
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            stored_format = find_stored_format(config, str(folder))
            self._tensors = self.enter_context(open_tensors(folder, stored_format, dtype, str(folder)))
        except ModelError as error:
            raise MergeError(str(error)) from None
        self._state_key = {key.partition(_STATE)[0]: key for key in self._tensors if _STATE in key}
        self.stored_4bit = frozenset(self._state_key)
        self._transposed: frozenset[str] = frozenset()
        state = {name + part for name in self.stored_4bit for part in _STATE_PARTS}
        self.names = tuple(key for key in self._tensors if _STATE not in key and key not in state)

    def transpose(self, names: frozenset[str]) -> None:
        """Transpose 4-bit tensors of layers stored as (in, out); bitsandbytes stores them as (out, in)."""
        self._transposed = names & self.stored_4bit

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's dequantized shape."""
        if name not in self.stored_4bit:
            return tuple(self._tensors[name].get_shape())
        shape = tuple(self._quant_state(name).shape)
        return shape[::-1] if name in self._transposed else shape

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor after `read`."""
        if name in self.stored_4bit:
            return self._quant_state(name).dtype
        stored = self._tensors[name].get_dtype()
        if stored not in DTYPES:
            raise MergeError(f"{self.folder}: {name} is stored as {stored}, which cannot be merged; use a 16-bit base")
        return DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor, dequantized."""
        tensor: torch.Tensor = self._tensors[name][...]
        if name not in self.stored_4bit:
            return tensor
        weight = by_bitsandbytes(tensor, self._quant_state(name))
        return weight.T.contiguous() if name in self._transposed else weight

    def _quant_state(self, name: str) -> QuantState:
        keys = [name + part for part in _STATE_PARTS if name + part in self._tensors] + [self._state_key[name]]
        return QuantState.from_dict({key: self._tensors[key][...] for key in keys}, device=torch.device("cpu"))
