"""The base checkpoint on disk: one tensor at a time, dequantised where it is stored in 4 or 8 bits.

Reading files instead of a loaded model is deliberate: on some CPUs bitsandbytes repacks the 4-bit weights of a live
model in place at its first evaluation, and what is dequantised from those afterwards is noise.

One file is open at a time: the pages of a file that was read count as memory of the process for as long as it is open.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from bitsandbytes.functional import QuantState, quantize_4bit
from safetensors import safe_open

from qlora_train.config.schema import QuantizationSection
from qlora_train.kernels.ops.dequantize import by_bitsandbytes
from qlora_train.models.checkpoint_tensors import plain_tensors
from qlora_train.models.prequantized import Parts, PrequantizedFormat, prequantized_format
from qlora_train.models.weight_files import INDEX, weight_files
from qlora_train.utils.errors import MergeError, ModelError

BLOCK_SIZE = 64
"""Weights that share one scale: bitsandbytes' block size for 4-bit linear layers."""
_STATE = ".quant_state.bitsandbytes__"
_STATE_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_FOREIGN = (".SCB", ".qweight", ".weight_scale", ".weight_scale_inv", "_blocks")
"""Ends of names in quantised formats, which none of the tensors has that are read."""
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


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
        self._where = _files_by_tensor(folder)
        self._open: tuple[str, Any] | None = None
        self._headers = _headers(folder, self._where)
        self._state_key = {key.partition(_STATE)[0]: key for key in self._where if _STATE in key}
        self.stored_4bit = frozenset(self._state_key)
        self._turned: frozenset[str] = frozenset()
        self._release, self._parts = _release(folder, {name: dtype for name, (_, dtype) in self._headers.items()})
        plain = self._where if self._release is None else plain_tensors(self._where, self._release, self._parts)
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
        if self._release is not None and name in self._parts:
            return self._release.shape(self._headers[self._parts[name][0]][0])
        if name not in self.stored_4bit:
            return self._headers[name][0]
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
        stored = self._headers[name][1]
        if stored not in _DTYPES:
            raise MergeError(
                f"{self.folder}: {name} is stored as {stored}, which the merge does not read; give 16 bits"
            )
        return _DTYPES[stored]

    def read(self, name: str) -> torch.Tensor:
        """Return one tensor in its stored dtype, quantised ones dequantised."""
        if self._release is not None and name in self._parts:
            codes, scales = (self._stored(part) for part in self._parts[name])
            return self._release.dequantize(codes, scales, self._released_dtype)
        if name not in self.stored_4bit:
            return self._stored(name)
        weight = by_bitsandbytes(self._file(name).get_tensor(name), self._quant_state(name))
        return weight.T.contiguous() if name in self._turned else weight

    def _stored(self, key: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file(key).get_tensor(key)
        return tensor

    def _file(self, key: str) -> Any:
        file = self._where[key]
        if self._open is None or self._open[0] != file:
            self._close()
            self._open = file, safe_open(str(self.folder / file), "pt", device="cpu").__enter__()
        return self._open[1]

    def _close(self) -> None:
        if self._open is not None:
            self._open[1].__exit__(None, None, None)
            self._open = None

    def _is_side_tensor(self, key: str) -> bool:
        return _STATE in key or any(key.endswith(p) and key.removesuffix(p) in self.stored_4bit for p in _STATE_PARTS)

    def _quant_state(self, name: str) -> QuantState:
        parts = [name + part for part in _STATE_PARTS if name + part in self._where] + [self._state_key[name]]
        return QuantState.from_dict({k: self._file(k).get_tensor(k) for k in parts}, device=torch.device("cpu"))


def _files_by_tensor(folder: Path) -> dict[str, str]:
    try:
        files = weight_files(folder, str(folder))
    except ModelError as error:
        raise MergeError(str(error)) from None
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        raise MergeError(f"{folder}: {missing[0]} is named in {INDEX} but not there; download the base again")
    return {tensor: path.name for path, tensors in files.items() for tensor in tensors or _tensor_names(path)}


def _tensor_names(path: Path) -> list[str]:
    with safe_open(str(path), "pt", device="cpu") as file:
        return list(file.keys())


def _release(folder: Path, dtypes: dict[str, str]) -> tuple[PrequantizedFormat | None, dict[str, Parts]]:
    """Return how the release stores its weights, and the parts of each; nothing for any other checkpoint."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        release = prequantized_format(config, str(folder))
        return release, {} if release is None else release.parts(dtypes)
    except ModelError as error:
        raise MergeError(str(error)) from None


def _headers(folder: Path, where: dict[str, str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return the shape and the stored dtype of every tensor."""
    headers = {}
    for name in sorted(set(where.values())):
        with safe_open(str(folder / name), "pt", device="cpu") as file:
            for key in file.keys():  # noqa: SIM118 (no mapping)
                part = file.get_slice(key)
                headers[key] = tuple(part.get_shape()), str(part.get_dtype())
    missing = sorted(set(where) - set(headers))
    if missing:
        raise MergeError(
            f"{folder}: {missing[0]} is named in {INDEX} but not in {where[missing[0]]}; download the base again"
        )
    return headers


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
