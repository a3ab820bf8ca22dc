"""llama.cpp's conversion scripts in a process that imports them once, and knows the splits of the tokenizer grid."""

import importlib
import json
import runpy
import sys
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from qlora_train.export.gguf.converter import Converter, describe_failure, find_converter
from qlora_train.utils.errors import ExportError
from qlora_train.utils.watched_process import Finished
from tests.support.tokenizer_grid import BYTE_LEVEL, TEXTS, trained

LLAMA_CPP = {"gpt2": "gpt-2", "cl100k": "dbrx", "qwen2": "qwen2", "digits": "smollm"}
"""What llama.cpp calls the splits of the grid."""
_TEXT = "\n".join(TEXTS)


@dataclass(frozen=True)
class ImportedConverter(Converter):
    """The installed scripts in one process; importing them takes seconds."""

    process: ProcessPoolExecutor

    def run(self, script: str, arguments: Sequence[str], *, what: Path) -> None:
        if output := self.process.submit(convert, self.folder / script, list(arguments)).result():
            raise ExportError(f"{what}: {script} {describe_failure(Finished(1, tuple(output.splitlines())))}")


@contextmanager
def imported_converter() -> Iterator[ImportedConverter]:
    folder = find_converter(None).folder
    with ProcessPoolExecutor(1, get_context("spawn"), load, (folder,)) as process:
        yield ImportedConverter(folder, process)


def load(folder: Path) -> None:
    """Make the scripts and their own `gguf` importable, in a process that has not imported another."""
    sys.path.insert(0, str(folder))
    known = _known_tokenizers()

    def name_of_split(_self: Any, tokenizer: Any) -> str:
        ids = tuple(tokenizer.encode(_TEXT, add_special_tokens=False))
        if ids not in known:
            raise NotImplementedError("BPE pre-tokenizer was not recognized")
        return known[ids]

    importlib.import_module("conversion.base").TextModel.get_vocab_base_pre = name_of_split


def convert(script: Path, arguments: list[str]) -> str:
    """Run a loaded script; return its traceback, empty if it succeeds."""
    sys.argv = [str(script), *arguments]
    try:
        runpy.run_path(str(script), run_name="__main__")
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
