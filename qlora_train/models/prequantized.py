"""Pre-quantized checkpoints in FP8 or MXFP4, read as the 16-bit weights that they represent.

Large models are released in FP8 (DeepSeek, Qwen, GLM: one scale per 128 x 128 block) or MXFP4 (gpt-oss: one power of two
per 32 values). Each tensor is dequantized in float32, rounded once to the compute dtype, and quantized to NF4 like any
other. Transformers' own dequantization refuses blocks that are cut at the edge of a matrix, as DeepSeek's are. Integer
formats with calibrated offsets (GPTQ, AWQ) are refused: their 16-bit originals are the better base.

E4M3, E5M2, E2M1 and E8M0: https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qlora_train.utils.errors import ModelError

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
CHUNK_WEIGHTS = 2**22
"""Weights dequantized at once, which bounds the float32 copies."""
Parts = tuple[str, str]
"""Names of the two tensors that a weight is stored as: codes and scales."""


@dataclass(frozen=True)
class PrequantizedFormat:
    """FP8 weights with one scale per tensor, per row or per block.

    Attributes:
        method: `quant_method` of config.json.
        scales: suffix of a weight's name for its scales.
        block: (rows, columns) of a block; None to infer it from the shape of the scales.
    """

    method: str
    scales: str
    block: tuple[int, int] | None = None

    @property
    def description(self) -> str:
        """The format for the log."""
        return self.method if self.block is None else f"{self.method} (blocks of {self.block[0]} x {self.block[1]})"

    def split(self, dtypes: Mapping[str, str]) -> tuple[list[str], dict[str, Parts]]:
        """Return the names of plain tensors, and the parts of every pre-quantized weight by its name.

        Scales of activations, keys and values are in neither.

        Args:
            dtypes: of all tensors by name, as safetensors calls them.

        Raises:
            ModelError: codes without scales.
        """
        weights = self._weights(dtypes)
        for codes, scales in weights.values():
            if scales not in dtypes:
                raise ModelError(
                    f"{codes} is stored in {self.method}, and its scales ({scales}) are missing; download the files "
                    "again, or use the 16-bit model"
                )
        used = {part for parts in weights.values() for part in parts}
        unused = (".activation_scale", ".input_scale", ".input_scale_ub", ".q_scale", ".k_scale", ".v_scale")
        return [name for name in dtypes if name not in used and not name.endswith(unused)], weights

    def _weights(self, dtypes: Mapping[str, str]) -> dict[str, Parts]:
        return {name: (name, name + self.scales) for name, dtype in dtypes.items() if dtype in FP8_DTYPES}

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a weight from that of its codes."""
        return codes

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return codes (..., rows, columns) times scales: one, or (..., row blocks, column blocks).

        Raises:
            ModelError: codes and scales of shapes that do not match.
        """
        factors = _powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
        if factors.numel() == 1:
            factors = factors.reshape(1, 1).expand(*codes.shape[:-2], 1, 1)
        block = self._block(tuple(codes.shape), tuple(factors.shape))
        weight = torch.empty(codes.shape, dtype=dtype)
        matrices = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (weight, codes, factors))
        for target, matrix, grid in zip(*matrices, strict=True):
            _multiply(target, matrix, grid, block)
        return weight

    def _block(self, codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Return rows and columns per scale; the last block of a dimension may be cut if the block size is known."""
        (rows, columns), (down, across) = codes[-2:], scales[-2:]
        block = self.block if self.block and (down, across) != (1, 1) else (-(-rows // down), -(-columns // across))
        divides = self.block is not None or (rows % down == 0 and columns % across == 0)
        fits = (-(-rows // block[0]), -(-columns // block[1])) == (down, across)
        if codes[:-2] != scales[:-2] or not fits or not divides:
            raise ModelError(f"a weight of {codes} has scales of {scales}, which do not match ({self.description})")
        return block


class Mxfp4(PrequantizedFormat):
    """Experts of gpt-oss: two E2M1 codes per byte, one E8M0 scale per 32 weights."""

    def _weights(self, dtypes: Mapping[str, str]) -> dict[str, Parts]:
        names = [codes.removesuffix("_blocks") for codes in dtypes if codes.endswith("_blocks")]
        return {name: (f"{name}_blocks", name + self.scales) for name in names}

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return (experts, in, out) of codes (experts, out, groups, 16)."""
        experts, out, groups, num_bytes = codes
        return experts, 2 * groups * num_bytes, out

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (experts, in, out) of codes (experts, out, groups, 16) and scales (experts, out, groups)."""
        if codes.shape[:-1] != scales.shape:
            raise ModelError(f"codes of {tuple(codes.shape)} have scales of {tuple(scales.shape)}, which do not match")
        weight = torch.empty(self.shape(tuple(codes.shape)), dtype=dtype)
        for target, packed, exponents in zip(weight, codes, scales, strict=True):  # one expert bounds the float32 copy
            values = _E2M1_PAIRS[packed.int()].flatten(-2)  # (out, groups, 32)
            target.copy_((values * _powers_of_two(exponents).unsqueeze(-1)).flatten(1).T)
        return weight


def prequantized_format(stored: Mapping[str, Any], where: str) -> PrequantizedFormat:
    """Return the format of a checkpoint's weights.

    Args:
        stored: `quantization_config` of config.json.
        where: prefix of the error message.

    Raises:
        ModelError: an unsupported format.
    """
    method = stored.get("quant_method", "unknown")
    if method == "mxfp4":
        return Mxfp4(method, "_scales")
    if method == "fp8":
        block = stored.get("weight_block_size")
        return PrequantizedFormat(method, "_scale_inv", None if block is None else (int(block[0]), int(block[1])))
    if method == "fbgemm_fp8":
        return PrequantizedFormat(method, "_scale")
    if method == "compressed-tensors" and (groups := _compressed_fp8_groups(stored)):
        blocks = {_compressed_block(group) for group in groups}
        return PrequantizedFormat(method, "_scale", blocks.pop() if len(blocks) == 1 else None)
    raise ModelError(
        f"{where} is already quantized with {method} {stored.get('format', '')}".rstrip()
        + ", which is not supported (supported: bitsandbytes 4-bit, fp8, fbgemm_fp8, mxfp4, float-quantized "
        "compressed-tensors); use the original 16-bit model"
    )


def _compressed_fp8_groups(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the weight settings of each group of layers; empty if one of them is not FP8."""
    groups = [group.get("weights") or {} for group in (stored.get("config_groups") or {}).values()]
    fp8 = all(
        (group.get("type"), group.get("num_bits"), group.get("symmetric")) == ("float", 8, True) for group in groups
    )
    return groups if fp8 and stored.get("format") == "float-quantized" else []


def _compressed_block(group: Mapping[str, Any]) -> tuple[int, int] | None:
    structure = group.get("block_structure") if group.get("strategy") == "block" else None
    return (int(structure[0]), int(structure[1])) if isinstance(structure, list) else None


def _powers_of_two(exponents: Tensor) -> Tensor:
    return (exponents.float() - 127).exp2()


def _multiply(target: Tensor, matrix: Tensor, grid: Tensor, block: tuple[int, int]) -> None:
    """Write `matrix` times the scale of each block to `target`, in chunks of rows."""
    rows, columns = block
    step = max(1, CHUNK_WEIGHTS // (matrix.shape[1] * rows))  # in blocks of rows
    for begin in range(0, len(grid), step):
        chunk = slice(begin * rows, (begin + step) * rows)
        factors = grid[begin : begin + step].repeat_interleave(rows, 0)[: len(target[chunk])]
        if columns < matrix.shape[1]:
            factors = factors.repeat_interleave(columns, 1)[:, : matrix.shape[1]]
        target[chunk] = matrix[chunk].float() * factors


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_E2M1_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
"""The two values of each byte, (256, 2), lower four bits first."""
