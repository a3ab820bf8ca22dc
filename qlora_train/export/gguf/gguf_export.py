"""A finished run in a format that another program runs: GGUF for llama.cpp and Ollama, merged or as an adapter.

Each format and quantisation has a folder of its own in ``RUN/export``, written whole or not at all::

    export/gguf-f16/       NAME-f16.gguf, Modelfile
    export/lora-gguf-f16/  NAME-lora-f16.gguf, Modelfile
    export/base-gguf-f16/  BASE-f16.gguf, to put the adapter over

What is written is opened again and compared with the weights it was made of before it gets its name.
"""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_train.config import RunConfig
from qlora_train.export.gguf.converter import LORA_SCRIPT, MODEL_SCRIPT, Converter
from qlora_train.export.gguf.gguf_check import GGUFCheck, GGUFFile, Source
from qlora_train.export.gguf.gguf_vocabulary import CONFIG, adds_bos, answer_end, link_model, puts_space_behind_special
from qlora_train.export.gguf.modelfile import modelfile
from qlora_train.export.gguf.plain_lora import write_plain_adapter
from qlora_train.export.gguf.reference_tokens import INSTALL, tokenize
from qlora_train.export.merging.adapter_deltas import AdapterFile
from qlora_train.export.merging.auxiliary_files import SENTENCEPIECE
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.export.merging.meta_model import build_meta_model
from qlora_train.export.model_card import public_name
from qlora_train.models import BaseSource
from qlora_train.models.loading import model_config
from qlora_train.models.token_probes import HARD_STRINGS, TokenProbe, difference_of
from qlora_train.models.tokenizer_files import follow_tokenizer_json
from qlora_train.runs import RunFolder
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

MODELFILE = "Modelfile"


def export_merged(folder: RunFolder, config: RunConfig, converter: Converter, quant: str) -> Path:
    """Write the merged model of a run as GGUF.

    Args:
        folder: a finished run that is merged.
        config: its settings.
        converter: llama.cpp's scripts.
        quant: kind of the numbers.

    Returns:
        The folder of the file.

    Raises:
        ExportError: the converter cannot, or what it wrote is not the model.
    """
    final, name = folder.exports / f"gguf-{quant}", _run_name(folder)
    _check_scaling(config)
    with atomic_io.atomic_folder(final, {"format": "gguf", "quant": quant}) as staging:
        path = staging / f"{name}-{quant}.gguf"
        tokenizer = _tokenizer(folder.merged, config)
        file, check = write_model(folder.merged, tokenizer, path, name, converter, quant, texts=_texts(folder))
        text = modelfile(
            tokenizer, model=f"./{path.name}", adapter=None, adds_bos=file.adds_bos(), system=folder.system_prompt()
        )
        (staging / MODELFILE).write_text(text, encoding="utf-8")
    logger.info("%s: %s", final / path.name, check.line())
    logger.info("Ollama: ollama create %s -f %s", name, final / MODELFILE)
    return final


def export_base(folder: RunFolder, config: RunConfig, source: BaseSource, converter: Converter, quant: str) -> Path:
    """Write the base of a run as GGUF, with the positions of the run, for an adapter over it.

    Args:
        folder: the run.
        config: its settings.
        source: its base, with weights.
        converter: llama.cpp's scripts.
        quant: kind of the numbers.

    Returns:
        The folder of the file.

    Raises:
        ExportError: the converter cannot, or what it wrote is not the model.
    """
    final = folder.exports / f"base-gguf-{quant}"
    _check_scaling(config)
    with atomic_io.atomic_folder(final, {"format": "base-gguf", "quant": quant}) as staging:
        path = staging / _base_file(source, quant)
        tokenizer = _tokenizer(source.folder, config)
        scaled = model_config(source, config.model).to_dict() if config.model.rope_scaling else None
        _, check = write_model(
            source.folder, tokenizer, path, _last_name(source), converter, quant, texts=_texts(folder), config=scaled
        )
    logger.info("%s: %s", final / path.name, check.line())
    return final


def export_adapter(folder: RunFolder, config: RunConfig, source: BaseSource, converter: Converter, quant: str) -> Path:
    """Write the adapter of a run as GGUF, for ``--lora`` of llama.cpp over the base as GGUF.

    Args:
        folder: a finished run.
        config: its settings.
        source: its base, of which config and tokenizer are read.
        converter: llama.cpp's scripts.
        quant: kind of the numbers.

    Returns:
        The folder of the file.

    Raises:
        ExportError: the adapter is more than LoRA, the converter cannot, or what it wrote is not the adapter.
    """
    final, name = folder.exports / f"lora-gguf-{quant}", _run_name(folder)
    _check_scaling(config)
    meta_model = build_meta_model(model_config(source, config.model), trust_remote_code=config.model.trust_remote_code)
    base_file = folder.exports / "base-gguf-f16" / _base_file(source, "f16")
    with atomic_io.atomic_folder(final, {"format": "lora-gguf", "quant": quant}) as staging:
        path = staging / f"{name}-lora-{quant}.gguf"
        with tempfile.TemporaryDirectory(dir=staging) as plain:
            tensors = write_plain_adapter(AdapterFile(folder.adapter, meta_model), Path(plain), name)
            settings = ["--base", str(source.folder), "--outfile", str(path), "--outtype", quant]
            converter.run(LORA_SCRIPT, [plain, *settings], what=folder.adapter)
        check = GGUFFile(path).check([_lora_source(key, tensor) for key, tensor in tensors.items()], quant)
        base = f"../{base_file.parent.name}/{base_file.name}"
        tokenizer, base_tokenizer = _tokenizer(folder.adapter, config), _tokenizer(source.folder, config)
        text = modelfile(
            tokenizer, model=base, adapter=f"./{path.name}", adds_bos=adds_bos(base_tokenizer),
            system=folder.system_prompt(),
        )  # fmt: skip
        (staging / MODELFILE).write_text(text, encoding="utf-8")
    logger.info("%s: %s", final / path.name, check.line())
    if config.model.rope_scaling:
        logger.warning(
            "%s belongs over the base with scaled positions (model.rope_scaling), as --format base-gguf writes it; over "
            "any other file of the base it is another model", path.name,
        )  # fmt: skip
    if not base_file.exists():
        logger.info("its base as GGUF: qlora-train export %s --format base-gguf", folder.path)
    if folder.read_results().get("merge", {}).get("kept") == "dequantized":
        logger.warning(
            "the merge measured the dequantised base to be better for this adapter than the 16-bit one, which llama.cpp "
            "puts it over: compare, or take --format gguf"
        )
    logger.info("Ollama: ollama create %s -f %s", name, final / MODELFILE)
    return final


def write_model(
    model: Path,
    tokenizer: Any,
    path: Path,
    name: str,
    converter: Converter,
    quant: str,
    *,
    texts: Sequence[str] = (),
    config: Mapping[str, Any] | None = None,
) -> tuple[GGUFFile, GGUFCheck]:
    """Convert a model folder to the file `path` and compare the two.

    Args:
        texts: prompts, whose tokens in llama.cpp must be the tokenizer's.
        config: content of config.json where it is not the folder's own.

    Raises:
        ExportError: the converter cannot, or what it wrote is not the model.
    """
    config = config or json.loads((model / CONFIG).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=path.parent) as view:
        link_model(model, Path(view), tokenizer, config)
        settings = ["--outfile", str(path), "--outtype", quant, "--model-name", name]
        converter.run(MODEL_SCRIPT, [view, *settings], what=model)
    file = GGUFFile(path)
    file.check_positions(config)
    _check_vocabulary(file, model, tokenizer)
    file.check_added_tokens(tokenizer)
    _check_tokens(path, tokenizer, texts)
    with BaseCheckpoint(model) as weights:
        return file, file.check([Source(key, partial(weights.read, key)) for key in weights.names], quant)


def _check_scaling(config: RunConfig) -> None:
    if (config.model.rope_scaling or {}).get("rope_type") == "dynamic":
        raise ExportError(
            "model.rope_scaling: llama.cpp has no dynamic scaling, without which the model is another one beyond its own "
            "positions; use the folder with Transformers or vLLM, or train with linear or yarn"
        )


def _tokenizer(folder: Path, config: RunConfig) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=config.model.trust_remote_code
    )
    return follow_tokenizer_json(tokenizer, folder, str(folder))  # as training takes it


def _texts(folder: RunFolder) -> list[str]:
    """Return the run's first rows as text."""
    rows = folder.data_report().get("first_rows", [])
    return ["".join(segment["text"] for segment in row["segments"]) for row in rows]


def _last_name(source: BaseSource) -> str:
    return public_name(source.name).rpartition("/")[2]


def _base_file(source: BaseSource, quant: str) -> str:
    return f"{_last_name(source)}-{quant}.gguf"


def _run_name(folder: RunFolder) -> str:
    return folder.path.resolve().name


def _check_vocabulary(file: GGUFFile, model: Path, tokenizer: Any) -> None:
    """Refuse a file with which a program would split text otherwise than in training, or never stop."""
    if file.guesses_merges():
        raise ExportError(
            f"{model}: the tokenizer is SentencePiece's, and without {SENTENCEPIECE} text would be split into other "
            f"tokens; put the {SENTENCEPIECE} that belongs to it there and export again"
        )
    end = answer_end(tokenizer)
    if end is not None and file.eos() != tokenizer.convert_tokens_to_ids(end):
        raise ExportError(
            f"{model}: answers end with {end}, and the converter wrote token {file.eos()} as the end, at which no answer "
            "would stop; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
        )
    space = file.puts_space_behind_special()
    if space is not None and space != puts_space_behind_special(tokenizer):
        raise ExportError(
            f"{model}: the converter {'puts a' if space else 'leaves out the'} space behind special tokens, against the "
            "tokenizer; use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
        )


def _check_tokens(path: Path, tokenizer: Any, texts: Sequence[str]) -> None:
    """Refuse a file of which llama.cpp makes other tokens of the run's texts; warn where only hard strings differ."""
    start = tokenizer.bos_token or tokenizer.all_special_tokens[0]  # as every prompt begins
    probes = [TokenProbe.of(tokenizer, text) for text in (*texts, *(start + text for text in HARD_STRINGS))]
    found = tokenize(path, [probe.text for probe in probes])
    if found is None:
        logger.warning("GGUF: tokens were not compared in llama.cpp, which is not installed: %s", INSTALL)
        return
    lines = [difference_of(tokenizer, probe, actual) for probe, actual in zip(probes, found, strict=True)]
    if wrong := [line for line in lines[: len(texts)] if line]:
        raise ExportError(
            f"{path.name}: llama.cpp makes other tokens of {len(wrong)} of the run's {len(texts)} texts: {wrong[0]}; use "
            "the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"
        )
    if wrong := [line for line in lines if line]:
        logger.warning(
            "GGUF: llama.cpp makes other tokens of %d of %d hard strings, which the run's first rows lack: %s",
            len(wrong), len(HARD_STRINGS), "; ".join(wrong[:3]),
        )  # fmt: skip
    logger.info("GGUF: %d texts of the run have the same tokens in llama.cpp", len(texts))


def _lora_source(key: str, tensor: Any) -> Source:
    module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return Source(f"{module}.weight", lambda: tensor, f".{kind.lower()}")
