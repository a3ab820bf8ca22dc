"""A finished run in a format that another program runs: GGUF for llama.cpp and Ollama, merged or as an adapter.

Each format and quantisation has a folder of its own in ``RUN/export``, written whole or not at all::

    export/gguf-f16/       NAME-f16.gguf, Modelfile
    export/lora-gguf-f16/  NAME-lora-f16.gguf, Modelfile

What is written is opened again and compared with the weights it was made of before it gets its name.
"""

import logging
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_train import durable
from qlora_train.checkpoint import RunFolder
from qlora_train.errors import ExportError
from qlora_train.export.adapter_file import AdapterFile
from qlora_train.export.base_file import BaseFile
from qlora_train.export.card import public_name
from qlora_train.export.companions import SENTENCEPIECE
from qlora_train.export.converter import LORA_SCRIPT, MODEL_SCRIPT, Converter
from qlora_train.export.gguf_file import GGUFCheck, GGUFFile, Source
from qlora_train.export.modelfile import modelfile
from qlora_train.export.plain_adapter import write_plain_adapter
from qlora_train.export.vocabulary import link_model, puts_space_behind_special
from qlora_train.loader import BaseSource

logger = logging.getLogger(__name__)


def export_merged(folder: RunFolder, converter: Converter, quant: str) -> Path:
    """Write the merged model of a run as GGUF.

    Args:
        folder: a finished run that is merged.
        converter: llama.cpp's scripts.
        quant: kind of the numbers.

    Returns:
        The folder of the file.

    Raises:
        ExportError: the converter cannot, or what it wrote is not the model.
    """
    name = _run_name(folder)
    final = folder.exports / f"gguf-{quant}"
    tokenizer = AutoTokenizer.from_pretrained(folder.merged, local_files_only=True)
    with durable.staged_folder(final, {"format": "gguf", "quant": quant}) as staging:
        path = staging / f"{name}-{quant}.gguf"
        with tempfile.TemporaryDirectory(dir=staging) as view:
            link_model(folder.merged, Path(view), tokenizer)
            settings = ["--outfile", str(path), "--outtype", quant, "--model-name", name]
            converter.run(MODEL_SCRIPT, [view, *settings], what=folder.merged)
        file = GGUFFile(path)
        _check_vocabulary(file, folder.merged, tokenizer)
        with BaseFile(folder.merged) as merged:
            check = file.check([Source(key, partial(merged.read, key)) for key in merged.names], quant)
        text = modelfile(tokenizer, model=path.name, adapter=None, adds_bos=file.adds_bos())
        (staging / "Modelfile").write_text(text, encoding="utf-8")
    _report(folder, final, path.name, check)
    return final


def export_adapter(folder: RunFolder, source: BaseSource, converter: Converter, quant: str) -> Path:
    """Write the adapter of a run as GGUF, for ``--lora`` of llama.cpp over the base as GGUF.

    Args:
        folder: a finished run.
        source: its base, of which the config is read.
        converter: llama.cpp's scripts.
        quant: kind of the numbers.

    Returns:
        The folder of the file.

    Raises:
        ExportError: the adapter is more than LoRA, the converter cannot, or what it wrote is not the adapter.
    """
    name = _run_name(folder)
    final = folder.exports / f"lora-gguf-{quant}"
    base_file = f"{public_name(source.name).rpartition('/')[2].removesuffix('.gguf')}-f16.gguf"
    with durable.staged_folder(final, {"format": "lora-gguf", "quant": quant}) as staging:
        path = staging / f"{name}-lora-{quant}.gguf"
        with tempfile.TemporaryDirectory(dir=staging) as temporary:
            plain = Path(temporary)
            tensors = write_plain_adapter(AdapterFile(folder.adapter, ""), plain, name)
            settings = ["--base", str(source.folder), "--outfile", str(path), "--outtype", quant]
            converter.run(LORA_SCRIPT, [str(plain), *settings], what=folder.adapter)
        check = GGUFFile(path).check([_lora_source(key, tensor) for key, tensor in tensors.items()], quant)
        tokenizer = AutoTokenizer.from_pretrained(folder.adapter, local_files_only=True)
        adds_bos = bool(tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id)
        text = modelfile(tokenizer, model=base_file, adapter=path.name, adds_bos=adds_bos)
        (staging / "Modelfile").write_text(text, encoding="utf-8")
    _report(folder, final, path.name, check)
    logger.info(
        "the base as GGUF: python %s %s --outfile %s --outtype f16",
        converter.folder / MODEL_SCRIPT, source.folder, final / base_file,
    )  # fmt: skip
    if folder.read_results().get("merge", {}).get("kept") == "dequantized":
        logger.warning(
            "the merge measured the dequantised base to be better for this adapter than the 16-bit one, which llama.cpp "
            "puts it over: compare, or take --format gguf"
        )
    return final


def _run_name(folder: RunFolder) -> str:
    return folder.path.resolve().name


def _check_vocabulary(file: GGUFFile, merged: Path, tokenizer: Any) -> None:
    """Refuse a file whose program would split text into other tokens than the model was trained on."""
    if file.guesses_merges():
        raise ExportError(
            f"{merged}: the tokenizer is SentencePiece's, and without {SENTENCEPIECE} text would be split into other "
            f"tokens; put {SENTENCEPIECE} of the base there and export again"
        )
    space = file.puts_space_behind_special()
    if space is not None and space != puts_space_behind_special(tokenizer):
        raise ExportError(
            f"{merged}: the converter {'puts a' if space else 'leaves out the'} space behind special tokens, against the "
            "tokenizer; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
        )


def _lora_source(key: str, tensor: Any) -> Source:
    module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return Source(f"{module}.weight", lambda: tensor, f".{kind.lower()}")


def _report(folder: RunFolder, final: Path, file: str, check: GGUFCheck) -> None:
    logger.info("%s: %s", final / file, check.line())
    logger.info("Ollama: ollama create %s -f %s", _run_name(folder), final / "Modelfile")
