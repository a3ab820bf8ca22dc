"""The number formats of GGUF files, one row each, for the CLI, the exporter and its checks. Imports nothing heavy.

The converter writes the first four; the others are llama.cpp's own mixes, which its quantizer makes from a 16-bit or 32-bit
file. Mixes that need an importance matrix (iq1 to iq3, q2_k_s) are not offered: llama.cpp refuses them without one.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from qlora_train.export.gguf.quant_mix import SUPER_BLOCK


@dataclass(frozen=True)
class GGUFQuant:
    """A number format.

    Attributes:
        name: for `--quant`; in capitals that of llama-quantize.
        file_type: llama.cpp's `llama_ftype`, which the file states as `general.file_type`.
        bits: per weight of matrices whose rows are whole blocks of 256, in the mean over a large model, rounded up.
        converted: written by the conversion script, without the quantizer.
    """

    name: str
    file_type: int
    bits: float
    converted: bool = False


_ROWS = (
    GGUFQuant("f16", 1, 16, converted=True),
    GGUFQuant("f32", 0, 32, converted=True),
    GGUFQuant("bf16", 32, 16, converted=True),
    GGUFQuant("q8_0", 7, 8.5, converted=True),
    GGUFQuant("q6_k", 18, 6.6),
    GGUFQuant("q5_k_m", 17, 5.8),
    GGUFQuant("q5_k_s", 16, 5.6),
    GGUFQuant("q5_0", 8, 5.6),
    GGUFQuant("q4_k_m", 15, 5.0),
    GGUFQuant("q4_k_s", 14, 4.7),
    GGUFQuant("q4_0", 2, 4.7),
    GGUFQuant("iq4_nl", 25, 4.7),
    GGUFQuant("iq4_xs", 30, 4.5),
    GGUFQuant("q3_k_l", 13, 4.4),
    GGUFQuant("q3_k_m", 12, 4.0),
    GGUFQuant("q3_k_s", 11, 3.7),
    GGUFQuant("q2_k", 10, 3.4),
)
QUANTS = {row.name: row for row in _ROWS}
MODEL_QUANTS = tuple(QUANTS)
"""Number formats of a model's file, the default first."""
ADAPTER_QUANTS = tuple(row.name for row in _ROWS if row.converted)
"""Number formats of an adapter's file, the default first; llama.cpp's quantizer reads only models."""
EXACT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
"""The number format that holds the weights of a dtype exactly."""
FALLBACK_BITS = 8.5
"""Most bits per weight of such matrices, and of embeddings and heads."""
VOCABULARY_BYTES = 32 * 1024**2
"""For tokens and merges; the largest vocabularies have 20 MB of them."""
_OUTER, _VECTOR_BITS = ("embed", "head", "wte"), 32


def estimated_bytes(quant: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return a close upper bound of a file's size from the shapes of the model's tensors."""
    bits = QUANTS[quant].bits
    num_bits = 0.0
    for name, shape in shapes.items():
        is_wide = shape[-1:] and shape[-1] % SUPER_BLOCK == 0 and not any(part in name for part in _OUTER)
        per_weight = _VECTOR_BITS if len(shape) < 2 else bits if is_wide else max(bits, FALLBACK_BITS)
        num_bits += per_weight * math.prod(shape)
    return math.ceil(num_bits / 8) + VOCABULARY_BYTES
