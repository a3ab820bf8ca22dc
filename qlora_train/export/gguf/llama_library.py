"""The part of llama.cpp's C interface that exports use, from the shared library in the package ``xllamacpp``.

The package's own interface, a server, neither quantizes nor returns logits. The functions here are declared by hand from
``llama.h``, ``ggml.h`` and ``gguf.h``. Structs of settings grow with each release. They are passed on as opaque bytes, more
than they have, and only the first fields are set, after a comparison of their defaults. Load the library only in a process
of its own: llama.cpp ends it at a file that it cannot use.
"""

import ctypes
import importlib.util
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

PACKAGE = "xllamacpp"
TESTED = "2026.10.11549"
"""Version whose interface is known to be the one declared here."""
DONE = "done"
"""Begins the line that the worker prints for each tensor, row or answer that is done."""
_OPAQUE_BYTES = 1024
_DEFAULTS = (512, 2048, 512, 1)
"""Defaults of `n_ctx`, `n_batch`, `n_ubatch` and `n_seq_max`, the first fields of a context's settings."""


class ModelSettings(ctypes.Structure):
    """Opaque `llama_model_params`."""

    _fields_ = (("content", ctypes.c_uint64 * (_OPAQUE_BYTES // 8)),)


class ContextSettings(ctypes.Structure):
    """`llama_context_params`, opaque behind its first fields."""

    _fields_ = (
        ("n_ctx", c_uint32), ("n_batch", c_uint32), ("n_ubatch", c_uint32), ("n_seq_max", c_uint32),
        ("rest", ctypes.c_uint64 * (_OPAQUE_BYTES // 8)),
    )  # fmt: skip


class Batch(ctypes.Structure):
    """`llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32), ("token", POINTER(c_int32)), ("embd", POINTER(c_float)), ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)), ("seq_id", POINTER(POINTER(c_int32))), ("logits", POINTER(c_int8)),
    )  # fmt: skip


class GGUFSettings(ctypes.Structure):
    """`gguf_init_params`."""

    _fields_ = (("no_alloc", c_bool), ("ctx", POINTER(c_void_p)))


_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelSettings, []),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelSettings]),
    "llama_model_free": (None, [c_void_p]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_tokenize": (c_int32, [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]),
    "llama_context_default_params": (ContextSettings, []),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextSettings]),
    "llama_adapter_lora_init": (c_void_p, [c_void_p, c_char_p]),
    "llama_set_adapters_lora": (c_int32, [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)]),
    "llama_free": (None, [c_void_p]),
    "llama_set_n_threads": (None, [c_void_p, c_int32, c_int32]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_type_name": (c_char_p, [c_int32]),
    "ggml_row_size": (c_size_t, [c_int32, c_int64]),
    "ggml_get_tensor": (c_void_p, [c_void_p, c_char_p]),
    "ggml_quantize_chunk": (c_size_t, [c_int32, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
    "ggml_validate_row_data": (c_bool, [c_int32, c_void_p, c_size_t]),
    "gguf_init_empty": (c_void_p, []),
    "gguf_init_from_file": (c_void_p, [c_char_p, GGUFSettings]),
    "gguf_set_kv": (None, [c_void_p, c_void_p]),
    "gguf_set_val_u32": (None, [c_void_p, c_char_p, c_uint32]),
    "gguf_add_tensor": (None, [c_void_p, c_void_p]),
    "gguf_set_tensor_type": (None, [c_void_p, c_char_p, c_int32]),
    "gguf_get_meta_size": (c_size_t, [c_void_p]),
    "gguf_get_meta_data": (None, [c_void_p, c_void_p]),
}
"""Result and arguments of each function."""


def load_library() -> Any:
    """Load the shared library and declare its functions.

    Raises:
        SystemExit: it is missing, or has another interface.
    """
    package = importlib.util.find_spec(PACKAGE)
    files = sorted(Path(str(package.origin)).parent.glob(f"{PACKAGE}*.so")) if package is not None else []
    if not files:
        raise _other_interface("no shared library")
    library = ctypes.CDLL(str(files[0]))
    missing = [name for name in _FUNCTIONS if not hasattr(library, name)]
    if missing:
        raise _other_interface(f"no {missing[0]}")
    for name, (result, arguments) in _FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    settings = library.llama_context_default_params()
    found = (settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max)
    if found != _DEFAULTS:
        raise _other_interface(f"context settings {found} instead of {_DEFAULTS}")
    return library


def _other_interface(problem: str) -> SystemExit:
    return SystemExit(f"the installed {PACKAGE} cannot be used ({problem}); run: pip install {PACKAGE}=={TESTED}")


def load_model(library: Any, file: Path) -> Any:
    """Load a GGUF file.

    Raises:
        SystemExit: llama.cpp cannot read it.
    """
    library.llama_backend_init()
    model = library.llama_model_load_from_file(str(file).encode(), library.llama_model_default_params())
    if not model:
        raise SystemExit("llama.cpp cannot read the file")
    return model
