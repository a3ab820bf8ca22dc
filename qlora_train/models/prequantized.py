"""Releases whose weights are stored in 8 or 4 bits with scales, read as the 16-bit weights that they stand for.

Large models are released in FP8 (DeepSeek, Qwen, GLM; in blocks of 128 x 128 that share a scale) or in MXFP4 (gpt-oss;
32 values share a power of two). Those numbers cannot be trained on in 4-bit NF4 directly: each tensor is multiplied out
in float32, rounded once to the dtype of the computation, and then quantised as any 16-bit one. This file knows the
formats and does the arithmetic on one tensor; it opens no file. Formats that store integers with calibrated offsets
(GPTQ, AWQ and others) are refused: their makers' 16-bit originals are the better base.

E4M3, E5M2 and E2M1 are the formats of https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
(with E8M0, the power of two); the fields of `quantization_config` are those that the releases carry.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qlora_train.utils.errors import ModelError

FLOATS_8BIT = ("F8_E4M3", "F8_E5M2")
"""Names of the 8-bit floating-point numbers in safetensors."""
MAX_CHUNK = 2**22
"""Weights that are multiplied out at a time, which bounds the float32 copies."""
Parts = tuple[str, str]
"""Names of the two tensors that one weight is stored as: its codes and its scales."""


class PrequantizedFormat(Protocol):
    """How a release stores its weights."""

    @property
    def description(self) -> str:
        """What it is in words, for the log."""

    def parts(self, dtypes: Mapping[str, str]) -> dict[str, Parts]:
        """Return the parts of every weight stored so, by the weight's name.

        Args:
            dtypes: of all tensors by name, in the words of safetensors.

        Raises:
            ModelError: codes without their scales.
        """

    @property
    def unused(self) -> tuple[str, ...]:
        """Ends of the names of tensors that no 16-bit weight is made of, such as scales of activations."""

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return a weight's shape from that of its codes."""

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight in `dtype`, multiplied out in float32 and rounded once.

        Raises:
            ModelError: the shapes of codes and scales do not fit.
        """


@dataclass(frozen=True)
class Fp8:
    """Weights in 8-bit floating point, each with a scale for the whole, for every row, or for every block.

    Attributes:
        method: as config.json names it.
        scales: what a weight's name is lengthened by for its scales.
        block: rows and columns that share a scale; None where the shape of the scales says it.
    """

    method: str
    scales: str
    block: tuple[int, int] | None

    @property
    def description(self) -> str:
        """What it is in words, for the log."""
        blocks = "" if self.block is None else f", a scale for {self.block[0]} x {self.block[1]} weights"
        return f"{self.method} (8-bit floating point{blocks})"

    def parts(self, dtypes: Mapping[str, str]) -> dict[str, Parts]:
        """Return the names of codes and scales by the weight's name."""
        found = {name: (name, name + self.scales) for name, dtype in dtypes.items() if dtype in FLOATS_8BIT}
        bare = sorted(codes for codes, scales in found.values() if scales not in dtypes)
        if bare:
            raise ModelError(
                f"{bare[0]} is stored in 8 bits ({self.method}), and its scales ({bare[0] + self.scales}) are not there; "
                "fetch the files again, or give the 16-bit model"
            )
        return found

    @property
    def unused(self) -> tuple[str, ...]:
        """Scales of activations and of cached keys and values."""
        return ".activation_scale", ".input_scale", ".input_scale_ub", ".q_scale", ".k_scale", ".v_scale"

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the codes, which are one a weight."""
        return codes

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Multiply codes (..., rows, columns) by scales: one, or (..., blocks of rows, blocks of columns)."""
        factors = powers_of_two(scales) if scales.dtype == torch.uint8 else scales.float()
        if factors.numel() == 1:
            factors = factors.reshape(1, 1).expand(*codes.shape[:-2], 1, 1)
        block = self._block(tuple(codes.shape), tuple(factors.shape))
        weight = torch.empty(codes.shape, dtype=dtype)
        matrices = (tensor.reshape(-1, *tensor.shape[-2:]) for tensor in (weight, codes, factors))
        for target, matrix, grid in zip(*matrices, strict=True):
            _multiply(target, matrix, grid, block)
        return weight

    def _block(self, codes: tuple[int, ...], scales: tuple[int, ...]) -> tuple[int, int]:
        """Return how many rows and columns share a scale; the last block of a dimension may be cut."""
        (rows, columns), (down, across) = codes[-2:], scales[-2:]
        single = down == across == 1
        block = self.block if self.block and not single else (-(-rows // down), -(-columns // across))
        whole = self.block is not None or (rows % down == 0 and columns % across == 0)
        if codes[:-2] != scales[:-2] or (-(-rows // block[0]), -(-columns // block[1])) != (down, across) or not whole:
            raise ModelError(f"a weight of {codes} has scales of {scales}, which do not fit ({self.description})")
        return block


@dataclass(frozen=True)
class Mxfp4:
    """Experts in MXFP4, as gpt-oss has them: pairs of 4-bit floating point in a byte, a power of two for each 32."""

    method: str = "mxfp4"

    @property
    def description(self) -> str:
        """What it is in words, for the log."""
        return f"{self.method} (4-bit floating point, a power of two for 32 weights)"

    def parts(self, dtypes: Mapping[str, str]) -> dict[str, Parts]:
        """Return the names of codes and scales by the weight's name."""
        found = {}
        for codes in (name for name in dtypes if name.endswith("_blocks")):
            weight = codes.removesuffix("_blocks")
            found[weight] = codes, weight + "_scales"
            if weight + "_scales" not in dtypes:
                raise ModelError(
                    f"{codes} is stored in 4 bits ({self.method}), and its scales ({weight}_scales) are not there; fetch "
                    "the files again, or give the 16-bit model"
                )
        return found

    @property
    def unused(self) -> tuple[str, ...]:
        """None: there is nothing else."""
        return ()

    def shape(self, codes: tuple[int, ...]) -> tuple[int, ...]:
        """Return (experts, in, out) of codes (experts, out, groups, 16)."""
        experts, out, groups, pairs = codes
        return experts, 2 * groups * pairs, out

    def dequantize(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        """Return (experts, in, out) of codes (experts, out, groups, 16) and scales (experts, out, groups)."""
        if codes.shape[:-1] != scales.shape:
            raise ModelError(
                f"codes of {tuple(codes.shape)} have scales of {tuple(scales.shape)}, which do not fit (mxfp4)"
            )
        weight = torch.empty(self.shape(tuple(codes.shape)), dtype=dtype)
        for target, packed, exponents in zip(weight, codes, scales, strict=True):
            values = _PAIRS[packed.int()].flatten(-2)  # (out, groups, 32)
            target.copy_((values * powers_of_two(exponents).unsqueeze(-1)).flatten(1).T)
        return weight


def prequantized_format(config: Mapping[str, Any], where: str) -> PrequantizedFormat | None:
    """Return how a checkpoint stores its weights; None for 16-bit ones, and for those that bitsandbytes stored in 4 bits.

    Args:
        config: the content of config.json.
        where: begins the message.

    Raises:
        ModelError: a format that is not read.
    """
    stored = config.get("quantization_config")
    if stored is None or stored.get("load_in_4bit"):
        return None
    method = stored.get("quant_method", "unknown")
    if method == "mxfp4":
        return Mxfp4()
    if method == "fp8":
        block = stored.get("weight_block_size")
        return Fp8(method, "_scale_inv", None if block is None else (int(block[0]), int(block[1])))
    if method == "fbgemm_fp8":
        return Fp8(method, "_scale", None)
    if method == "compressed-tensors" and (kinds := _compressed_kinds(stored)):
        blocks = {_compressed_block(kind) for kind in kinds}
        return Fp8(method, "_scale", blocks.pop() if len(blocks) == 1 else None)
    raise ModelError(
        f"{where} is quantised already with {method} {stored.get('format', '')}".rstrip()
        + ", which is not read (read are bitsandbytes 4-bit, fp8, fbgemm_fp8, mxfp4, and float-quantized "
        "compressed-tensors); give the original 16-bit model"
    )


def powers_of_two(exponents: Tensor) -> Tensor:
    """Return the values of E8M0: a byte b is 2 ** (b - 127)."""
    return (exponents.float() - 127).exp2()


def _compressed_kinds(stored: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return how each group of layers stores its weights, or none when one of them is not 8-bit floating point."""
    groups = (stored.get("config_groups") or {}).values()
    kinds = [group.get("weights") or {} for group in groups]
    plain = all((kind.get("type"), kind.get("num_bits"), kind.get("symmetric")) == ("float", 8, True) for kind in kinds)
    return kinds if plain and stored.get("format") == "float-quantized" else []


def _compressed_block(kind: Mapping[str, Any]) -> tuple[int, int] | None:
    structure = kind.get("block_structure") if kind.get("strategy") == "block" else None
    return (int(structure[0]), int(structure[1])) if isinstance(structure, list) else None


def _multiply(target: Tensor, matrix: Tensor, grid: Tensor, block: tuple[int, int]) -> None:
    """Write `matrix` times the scale of each block to `target`, some rows at a time."""
    rows, columns = block
    step = max(1, MAX_CHUNK // (matrix.shape[1] * rows))  # blocks of rows at a time
    for begin in range(0, len(grid), step):
        chunk = slice(begin * rows, (begin + step) * rows)
        factors = grid[begin : begin + step].repeat_interleave(rows, 0)[: len(target[chunk])]
        factors = factors if columns >= matrix.shape[1] else factors.repeat_interleave(columns, 1)[:, : matrix.shape[1]]
        target[chunk] = matrix[chunk].float() * factors


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
_PAIRS = torch.stack([_E2M1.repeat(16), _E2M1.repeat_interleave(16)], dim=1)
"""The two values of a byte, (256, 2): the first is in the lower four bits."""
