"""Write a quantized copy of a 16-bit or 32-bit GGUF file with the functions of llama.cpp's library.

Header and tensors are written in the order of `llama-quantize`, so that the files are equal byte by byte. Runs in the
worker.
"""

import ctypes
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from qlora_train.export.gguf.llama_library import DONE, GGUFSettings, load_library

ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
CHUNK_VALUES = 1 << 20
"""Values that a thread converts at once; 4 MB in float32."""
_KINDS = gguf.GGMLQuantizationType
_DTYPES = {_KINDS.F32: np.dtype(np.float32), _KINDS.F16: np.dtype(np.float16), _KINDS.BF16: np.dtype(np.uint16)}
Values = npt.NDArray[np.float32]


def write_quantized(
    source: str, target: str, file_type: int, types: Mapping[str, str], num_threads: int
) -> dict[str, Any]:
    """Write `target` from `source`, with the tensors in `types` converted to their type there."""
    library, reader = load_library(), gguf.GGUFReader(source)
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    names = sorted(tensors, key=_in_order)
    with Path(target).open("wb") as file, ThreadPoolExecutor(num_threads) as threads:
        file.write(_header(library, source, names, file_type, types))
        for name in names:
            start = file.tell()
            if name in types:
                for block in _quantized(library, tensors[name], _KINDS[types[name]], threads):
                    file.write(block)
            else:
                file.write(tensors[name].data.tobytes())
            file.write(b"\0" * (-(file.tell() - start) % ALIGNMENT))
            print(f"{DONE}: {name}", flush=True)
    return {"ggml": library.ggml_version().decode()}


def _in_order(name: str) -> tuple[int, bytes]:
    layer = name.removeprefix("blk.").partition(".")[0]
    return (int(layer) if name.startswith("blk.") and layer.isdigit() else -1), name.encode()


def _header(library: Any, source: str, names: list[str], file_type: int, types: Mapping[str, str]) -> bytes:
    tensors = ctypes.c_void_p()
    read = library.gguf_init_from_file(source.encode(), GGUFSettings(True, ctypes.pointer(tensors)))
    if not read:
        raise SystemExit(f"{Path(source).name}: cannot be read")
    written = library.gguf_init_empty()
    library.gguf_set_kv(written, read)
    library.gguf_set_val_u32(written, b"general.quantization_version", gguf.GGML_QUANT_VERSION)
    library.gguf_set_val_u32(written, b"general.file_type", file_type)
    for name in names:
        library.gguf_add_tensor(written, library.ggml_get_tensor(tensors, name.encode()))
        if name in types:
            library.gguf_set_tensor_type(written, name.encode(), int(_KINDS[types[name]]))
    content = ctypes.create_string_buffer(library.gguf_get_meta_size(written))
    library.gguf_get_meta_data(written, content)
    return content.raw


def _quantized(library: Any, tensor: gguf.ReaderTensor, kind: Any, threads: ThreadPoolExecutor) -> Iterator[bytes]:
    """Yield a tensor's rows in another type; without an importance matrix each row is converted by itself."""
    row = int(tensor.shape[0])
    rows = tensor.data.view(_DTYPES[tensor.tensor_type]).reshape(-1, row)
    if kind == _KINDS.F16:
        yield from (_to_float32(part).astype(np.float16).tobytes() for part in _chunks(rows))
        return
    row_bytes = library.ggml_row_size(int(kind), row)

    def convert(part: npt.NDArray[Any]) -> bytes:
        values = np.ascontiguousarray(_to_float32(part))
        content = ctypes.create_string_buffer(row_bytes * len(part))
        library.ggml_quantize_chunk(int(kind), values.ctypes.data, content, 0, len(part), row, None)
        is_valid = np.isfinite(values).all() and library.ggml_validate_row_data(int(kind), content, len(content))
        if not is_valid:
            raise SystemExit(f"{tensor.name}: values that are not finite, or too large for {kind.name}")
        return content.raw

    yield from threads.map(convert, _chunks(rows))


def _chunks(rows: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    count = max(1, CHUNK_VALUES // rows.shape[1])
    return [rows[start : start + count] for start in range(0, len(rows), count)]


def _to_float32(rows: npt.NDArray[Any]) -> Values:
    if rows.dtype == np.uint16:  # bfloat16: the upper half of a float32
        return (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float32)
