"""Export a finished run as GGUF, for llama.cpp and Ollama: the merged model, the adapter or the base.

Each format and quantization has its own folder in ``RUN/export``, written atomically::

    export/gguf-f16/       NAME-f16.gguf, Modelfile
    export/lora-gguf-f16/  NAME-lora-f16.gguf, Modelfile
    export/base-gguf-f16/  BASE-f16.gguf, which the adapter is applied to

Every file is read back and compared with its source weights before the folder gets its name.
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
from qlora_train.export.export_formats import ExportRequest
from qlora_train.export.gguf.converter import LORA_SCRIPT, MODEL_SCRIPT, Converter, find_converter
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
from qlora_train.runs import RunFolder, read_json
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

MODELFILE = "Modelfile"
INSTEAD = "use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"


def export_merged(request: ExportRequest) -> Path:
    """Write the merged model of a run as GGUF, with a Modelfile.

    Raises:
        ExportError: the conversion failed, or the file differs from the model.
    """
    run, quant, name = request.run, request.quant, _run_name(request.run)
    _check_scaling(request.config)
    final = run.exports / f"gguf-{quant}"
    with atomic_io.atomic_folder(final, {"format": "gguf", "quant": quant}) as staging:
        path = staging / f"{name}-{quant}.gguf"
        tokenizer = load_tokenizer(run.merged, request.config)
        converter = find_converter(request.llama_cpp)
        file, check = write_model(run.merged, tokenizer, path, name, converter, quant, texts=_texts(run))
        text = modelfile(
            tokenizer, model=f"./{path.name}", adapter=None, adds_bos=file.adds_bos(), system=run.system_prompt()
        )
        (staging / MODELFILE).write_text(text, encoding="utf-8")
    logger.info("%s: %s", final / path.name, check.summary())
    logger.info("Ollama: ollama create %s -f %s", name, final / MODELFILE)
    return final


def export_base(request: ExportRequest) -> Path:
    """Write the base of a run as GGUF, with the run's RoPE scaling, for an adapter that is applied to it.

    Raises:
        ExportError: the conversion failed, or the file differs from the model.
    """
    run, config, source, quant = request.run, request.config, request.source, request.quant
    assert source is not None, "the format needs the base"
    _check_scaling(config)
    final = run.exports / f"base-gguf-{quant}"
    with atomic_io.atomic_folder(final, {"format": "base-gguf", "quant": quant}) as staging:
        path = staging / _base_file(source, quant)
        tokenizer, converter = load_tokenizer(source.folder, config), find_converter(request.llama_cpp)
        scaled = model_config(source, config.model).to_dict() if config.model.rope_scaling else None
        _, check = write_model(
            source.folder, tokenizer, path, _last_name(source), converter, quant, texts=_texts(run), config=scaled
        )
    logger.info("%s: %s", final / path.name, check.summary())
    return final


def export_adapter(request: ExportRequest) -> Path:
    """Write the adapter of a run as GGUF, for ``--lora`` of llama.cpp, with a Modelfile.

    Raises:
        ExportError: the adapter is not plain LoRA, the conversion failed, or the file differs from the adapter.
    """
    run, config, source, quant = request.run, request.config, request.source, request.quant
    assert source is not None, "the format needs the base"
    _check_scaling(config)
    final, name = run.exports / f"lora-gguf-{quant}", _run_name(run)
    meta_model = build_meta_model(model_config(source, config.model), trust_remote_code=config.model.trust_remote_code)
    base_file = run.exports / "base-gguf-f16" / _base_file(source, "f16")
    with atomic_io.atomic_folder(final, {"format": "lora-gguf", "quant": quant}) as staging:
        path = staging / f"{name}-lora-{quant}.gguf"
        with tempfile.TemporaryDirectory(dir=staging) as plain:
            tensors = write_plain_adapter(AdapterFile(run.adapter, meta_model), Path(plain), name)
            settings = ["--base", str(source.folder), "--outfile", str(path), "--outtype", quant]
            find_converter(request.llama_cpp).run(LORA_SCRIPT, [plain, *settings], what=run.adapter)
        check = GGUFFile(path).check([_lora_source(key, tensor) for key, tensor in tensors.items()], quant)
        text = modelfile(
            load_tokenizer(run.adapter, config), model=f"../{base_file.parent.name}/{base_file.name}",
            adapter=f"./{path.name}", adds_bos=adds_bos(load_tokenizer(source.folder, config)),
            system=run.system_prompt(),
        )  # fmt: skip
        (staging / MODELFILE).write_text(text, encoding="utf-8")
    logger.info("%s: %s", final / path.name, check.summary())
    _log_limits(run, config, path.name, base_file)
    logger.info("Ollama: ollama create %s -f %s", name, final / MODELFILE)
    return final


def _log_limits(run: RunFolder, config: RunConfig, file: str, base_file: Path) -> None:
    if config.model.rope_scaling:
        logger.warning(
            "%s: apply it to the base with the run's RoPE scaling (model.rope_scaling), as --format base-gguf writes it",
            file,
        )
    if not base_file.exists():
        logger.info("its base as GGUF: qlora-train export %s --format base-gguf", run.path)
    if run.read_results().get("merge", {}).get("merge_base") == "dequantized":
        logger.warning(
            "GGUF: the merge measured a lower loss on the dequantized base than on the 16-bit base, which llama.cpp "
            "applies the adapter to; compare, or use --format gguf"
        )


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
        texts: prompts that llama.cpp must tokenize as the tokenizer does.
        config: content of config.json where it differs from the folder's.

    Raises:
        ExportError: the conversion failed, or the file differs from the model.
    """
    config = config or json.loads((model / CONFIG).read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory(dir=path.parent) as view:
        link_model(model, Path(view), tokenizer, config)
        settings = ["--outfile", str(path), "--outtype", quant, "--model-name", name]
        converter.run(MODEL_SCRIPT, [view, *settings], what=model)
    file = GGUFFile(path)
    file.check_rope_scaling(config)
    _check_vocabulary(file, model, tokenizer)
    file.check_added_tokens(tokenizer)
    _check_tokens(path, tokenizer, texts)
    with BaseCheckpoint(model) as weights:
        return file, file.check([Source(key, partial(weights.read, key)) for key in weights.names], quant)


def load_tokenizer(folder: Path, config: RunConfig) -> Any:
    """Load the tokenizer of a folder as training does, without AutoTokenizer's changes to tokenizer.json."""
    tokenizer = AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=config.model.trust_remote_code
    )
    return follow_tokenizer_json(tokenizer, folder, str(folder))


def _check_scaling(config: RunConfig) -> None:
    if (config.model.rope_scaling or {}).get("rope_type") == "dynamic":
        raise ExportError(
            "model.rope_scaling: llama.cpp does not support dynamic RoPE scaling; use the folder with Transformers or "
            "vLLM, or train with linear or yarn"
        )


def _texts(run: RunFolder) -> list[str]:
    """Return the run's first rows as text."""
    rows = read_json(run.data_report_file).get("first_rows", [])
    return ["".join(segment["text"] for segment in row["segments"]) for row in rows]


def _last_name(source: BaseSource) -> str:
    return public_name(source.name).rpartition("/")[2]


def _base_file(source: BaseSource, quant: str) -> str:
    return f"{_last_name(source)}-{quant}.gguf"


def _run_name(run: RunFolder) -> str:
    return run.path.resolve().name


def _check_vocabulary(file: GGUFFile, model: Path, tokenizer: Any) -> None:
    """Refuse a file that would make a program tokenize text differently, or never stop."""
    if file.guesses_merges():
        raise ExportError(
            f"{model}: the tokenizer is SentencePiece's, and without {SENTENCEPIECE} llama.cpp would split text into "
            f"other tokens; add its {SENTENCEPIECE} and export again"
        )
    end = answer_end(tokenizer)
    if end is not None and file.eos() != tokenizer.convert_tokens_to_ids(end):
        raise ExportError(
            f"{model}: answers end with {end}, but the converter wrote token {file.eos()} as end of text, so that no "
            f"answer would stop; {INSTEAD}"
        )
    space = file.puts_space_behind_special()
    if space is not None and space != puts_space_behind_special(tokenizer):
        raise ExportError(
            f"{model}: the converter {'adds a' if space else 'omits the'} space after special tokens, unlike the "
            f"tokenizer; {INSTEAD}"
        )


def _check_tokens(path: Path, tokenizer: Any, texts: Sequence[str]) -> None:
    """Refuse a file if llama.cpp tokenizes the run's texts differently; warn if only hard strings differ."""
    start = tokenizer.bos_token or tokenizer.all_special_tokens[0]  # as every prompt begins
    probes = [TokenProbe.of(tokenizer, text) for text in (*texts, *(start + text for text in HARD_STRINGS))]
    actual = tokenize(path, [probe.text for probe in probes])
    if actual is None:
        logger.warning("GGUF: tokens not compared with llama.cpp (not installed: %s)", INSTALL)
        return
    lines = [difference_of(tokenizer, probe, ids) for probe, ids in zip(probes, actual, strict=True)]
    if wrong := [line for line in lines[: len(texts)] if line]:
        raise ExportError(
            f"{path.name}: llama.cpp tokenizes {len(wrong)} of the run's {len(texts)} texts differently: {wrong[0]}; "
            f"{INSTEAD}"
        )
    if wrong := [line for line in lines if line]:
        logger.warning(
            "GGUF: llama.cpp tokenizes %d of %d hard strings differently (none in the run's first rows): %s",
            len(wrong), len(HARD_STRINGS), "; ".join(wrong[:3]),
        )  # fmt: skip
    logger.info("GGUF: llama.cpp tokenizes %d texts of the run alike", len(texts))


def _lora_source(key: str, tensor: Any) -> Source:
    module, _, kind = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return Source(f"{module}.weight", lambda: tensor, f".{kind.lower()}")
