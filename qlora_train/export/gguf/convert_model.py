"""Convert a model folder to a GGUF file with llama.cpp's script, and compare the two before anything uses the file."""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qlora_train.config import RunConfig
from qlora_train.export.gguf.converter import MODEL_SCRIPT, Converter
from qlora_train.export.gguf.gguf_check import GGUFCheck, GGUFFile, Source
from qlora_train.export.gguf.gguf_vocabulary import CONFIG, answer_end, link_model, puts_space_behind_special
from qlora_train.export.gguf.llama_process import INSTALL, has_library, tokenize_file
from qlora_train.export.merging.auxiliary_files import SENTENCEPIECE
from qlora_train.export.merging.base_checkpoint import BaseCheckpoint
from qlora_train.models.token_probes import HARD_STRINGS, TokenProbe, difference_of
from qlora_train.models.tokenizer_files import follow_tokenizer_json
from qlora_train.utils.errors import ExportError

logger = logging.getLogger(__name__)

INSTEAD = "use the folder with Transformers or vLLM, or a newer llama.cpp: --llama-cpp FOLDER"


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
    if not has_library():
        logger.warning("GGUF: tokens not compared with llama.cpp (not installed: %s)", INSTALL)
        return
    actual = tokenize_file(path, [probe.text for probe in probes])
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
