"""Tokenize texts with llama.cpp. Runs in the worker."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_train.export.gguf.llama_library import load_library, load_model


def tokenize(model: str, texts: Sequence[str], num_threads: int) -> dict[str, Any]:
    """Return the token ids of texts, without added special tokens; those in the text are parsed."""
    del num_threads
    library = load_library()
    vocabulary = library.llama_model_get_vocab(load_model(library, Path(model)))

    def ids_of(text: str) -> list[int]:
        content = text.encode()
        ids = (ctypes.c_int32 * (len(content) + 8))()  # a token has at least one byte, but for spaces put before words
        count = library.llama_tokenize(vocabulary, content, len(content), ids, len(ids), False, True)
        if count < 0:
            raise SystemExit(f"llama.cpp splits a text of {len(content)} bytes into {-count} tokens")
        return ids[:count]

    return {"ids": [ids_of(text) for text in texts]}
