"""Quantize a matrix with ggml itself in every number format: `python ggml_blocks.py FILE NUMBER...`.

Written is an .npz file with the blocks `NUMBER` and the values `NUMBER.values` that ggml dequantizes them to.
"""

import ctypes
import sys
from ctypes import CFUNCTYPE, POINTER, c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np
import xllamacpp

ROWS, COLUMNS = 4, 512


class TypeTraits(ctypes.Structure):
    """`ggml_type_traits`."""

    _fields_ = (
        ("type_name", c_char_p), ("blck_size", c_int64), ("blck_size_interleave", c_int64), ("type_size", c_size_t),
        ("is_quantized", c_bool), ("to_float", CFUNCTYPE(None, c_void_p, POINTER(c_float), c_int64)),
    )  # fmt: skip


def main(path: str, numbers: list[int]) -> None:
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    library.ggml_get_type_traits.restype, library.ggml_get_type_traits.argtypes = POINTER(TypeTraits), [c_int]
    library.ggml_quantize_chunk.restype = c_size_t
    library.ggml_quantize_chunk.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    library.ggml_cpu_init()
    weights = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    importance = np.ones(COLUMNS, np.float32)
    made = {}
    for number in numbers:
        traits = library.ggml_get_type_traits(number).contents
        blocks = np.zeros((ROWS, COLUMNS // traits.blck_size * traits.type_size), np.uint8)
        library.ggml_quantize_chunk(
            number, weights.ctypes.data, blocks.ctypes.data, 0, ROWS, COLUMNS, importance.ctypes.data
        )
        values = np.empty((ROWS, COLUMNS), np.float32)
        traits.to_float(blocks.ctypes.data, values.ctypes.data_as(POINTER(c_float)), ROWS * COLUMNS)
        made[str(number)], made[f"{number}.values"] = blocks, values
    np.savez(path, **made)


if __name__ == "__main__":
    main(sys.argv[1], [int(number) for number in sys.argv[2:]])
