"""llama.cpp's conversion script in a process that imports it once, with a table of tokenizers that has the grid's."""

import importlib
import json
import sys
import traceback
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tests.support.tokenizer_grid import BYTE_LEVEL, TEXTS, trained

LLAMA_CPP = {"gpt2": "gpt-2", "cl100k": "dbrx", "qwen2": "qwen2", "digits": "smollm"}
"""What llama.cpp calls the splits of the grid."""
_TEXT = "\n".join(TEXTS)


def load(folder: Path) -> None:
    """Import the script of a folder of llama.cpp, with its own `gguf`: not in a process that has imported another."""
    sys.path.insert(0, str(folder))
    known = _known_tokenizers()

    def name_of_split(_self: Any, tokenizer: Any) -> str:
        ids = tuple(tokenizer.encode(_TEXT, add_special_tokens=False))
        if ids not in known:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")
        return known[ids]

    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = name_of_split


def convert(script: str, arguments: list[str]) -> str:
    """Run a loaded script; return its traceback, empty where it ended well."""
    sys.argv = [script, *arguments]
    try:
        importlib.import_module(Path(script).stem).main()
    except Exception:
        return traceback.format_exc()
    return ""


def _known_tokenizers() -> dict[tuple[int, ...], str]:
    """Return llama.cpp's name of a split by what it makes of the grid's texts, with each of the vocabularies."""
    known: dict[tuple[int, ...], str] = {}
    for vocabulary in BYTE_LEVEL:
        for split in (vocabulary, *BYTE_LEVEL):
            content, other = json.loads(trained(vocabulary)), json.loads(trained(split))
            content |= {key: other[key] for key in ("normalizer", "pre_tokenizer")}
            ids = Tokenizer.from_str(json.dumps(content)).encode(_TEXT).ids
            known.setdefault(tuple(ids), LLAMA_CPP[split])
    return known
