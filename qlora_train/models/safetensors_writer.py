"""Writing a safetensors file while holding one tensor at a time."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The words of safetensors for the dtypes that are written."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor to write: its shape and dtype."""

    shape: torch.Size
    dtype: torch.dtype


def write_safetensors(path: Path, tensors: Mapping[str, TensorSpec], make: Callable[[str], Tensor]) -> None:
    """Write `make(name)` for each name.

    The format (https://github.com/huggingface/safetensors#format): the header's length in 8 bytes, the header as JSON
    with name, dtype, shape and place of each tensor, then their bytes in that order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, described in tensors.items():
        begin, end = end, end + described.shape.numel() * described.dtype.itemsize
        place = {"shape": list(described.shape), "data_offsets": [begin, end]}
        header[name] = {"dtype": NAMES[described.dtype], **place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, described in tensors.items():
            tensor = make(name)
            found = TensorSpec(tensor.shape, tensor.dtype)
            assert found == described, f"{name} is {found} instead of {described}"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
