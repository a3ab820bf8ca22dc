"""Write the files of a merged folder besides its weights: config, generation config, tokenizer, processor and code.

A fine-tuned model ends its answers with the tokens it was trained on, and the base often names others: a base model's eos
is rarely the end of turn of a chat template. The written files name both, so that every engine stops.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from qlora_train.evaluation.generation import answer_end_ids
from qlora_train.export.merging.merged_config import write_config
from qlora_train.models.tokenizer_files import (
    READ_ERRORS,
    check_reloads,
    follow_tokenizer_json,
    write_transformers_4_names,
)
from qlora_train.utils.errors import MergeError, ModelError, first_line

GENERATION_CONFIG = "generation_config.json"
SENTENCEPIECE = "tokenizer.model"
NAMED_TEMPLATES = "additional_chat_templates"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", SENTENCEPIECE, "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def write_auxiliary_files(
    folder: Path,
    base_folder: Path,
    adapter_folder: Path,
    config: Any,
    *,
    tied: bool,
    num_embeddings: int,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
) -> None:
    """Complete a folder of merged weights to a model folder.

    Code and processor come from the base, tokenizer and generation config from the adapter, or else from the base.

    Args:
        config: Transformers config of the model; updated in place.
        dtype: of the weights; None for the base's.
    """
    text = config.get_text_config()
    config.dtype, config._name_or_path = dtype or config.dtype, ""
    text.tie_word_embeddings = config.tie_word_embeddings = tied
    text.vocab_size = num_embeddings
    for file in (*base_folder.glob("*.py"), *(base_folder / name for name in _PROCESSOR_FILES)):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    tokenizer = _copy_tokenizer(base_folder, adapter_folder, folder, config, trust_remote_code)
    write_transformers_4_names(folder)
    generation = _generation_config(adapter_folder, base_folder)
    special = _special_ids(tokenizer, text, generation)
    for key, value in special.items():
        setattr(text, key, value)
        setattr(config, key, value)
    write_config(folder, base_folder, config)
    if tokenizer is not None:
        try:
            check_reloads(tokenizer, folder, trust_remote_code=trust_remote_code)
        except ModelError as error:
            raise MergeError(
                f"from the merged folder {error}; use the adapter, or another version of Transformers"
            ) from None
    content = json.dumps({**generation, **special}, indent=2, sort_keys=True)
    (folder / GENERATION_CONFIG).write_text(content + "\n", encoding="utf-8")


def _special_ids(tokenizer: Any, text_config: Any, generation: dict[str, Any]) -> dict[str, int | list[int]]:
    """Return `eos_token_id` and `pad_token_id` for both configs; the tokenizer's ends of answers come first."""
    special: dict[str, int | list[int]] = {}
    ends = [*_ids(generation.get("eos_token_id")), *_ids(getattr(text_config, "eos_token_id", None))]
    if tokenizer is not None:
        ends = [*answer_end_ids(tokenizer), *ends]
        # the model does not load with an id beyond the embedding
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < text_config.vocab_size:
            special["pad_token_id"] = tokenizer.pad_token_id
    unique = list(dict.fromkeys(ends))
    if unique:
        special["eos_token_id"] = unique if len(unique) > 1 else unique[0]
    return special


def _copy_tokenizer(base_folder: Path, adapter_folder: Path, folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Copy all tokenizer files of the adapter, or else of the base, and load the tokenizer; None if there is none."""
    source = adapter_folder if (adapter_folder / "tokenizer_config.json").is_file() else base_folder
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        return None
    # a fast tokenizer does not save it, and without its scores other programs split text differently
    if not (source / SENTENCEPIECE).is_file() and (base_folder / SENTENCEPIECE).is_file():
        files.append(base_folder / SENTENCEPIECE)
    for file in files:
        shutil.copyfile(file, folder / file.name)
    if (source / NAMED_TEMPLATES).is_dir():
        shutil.copytree(source / NAMED_TEMPLATES, folder / NAMED_TEMPLATES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source, config=config, trust_remote_code=trust_remote_code, local_files_only=True
        )
        return follow_tokenizer_json(tokenizer, source, str(source))
    except READ_ERRORS as error:
        raise MergeError(
            f"the tokenizer of the adapter cannot be read: {first_line(error)}; restore its folder, or train again"
        ) from error


def _generation_config(adapter_folder: Path, base_folder: Path) -> dict[str, Any]:
    """Return the content of the first generation_config.json, empty if there is none."""
    for path in (adapter_folder / GENERATION_CONFIG, base_folder / GENERATION_CONFIG):
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise MergeError(f"{path}: not readable as JSON ({error}); restore it") from None
        if not isinstance(content, dict):
            raise MergeError(f"{path}: not a mapping; restore it")
        # with it Transformers reads the tokens from config.json instead
        content.pop("_from_model_config", None)
        return content
    return {}


def _ids(setting: int | list[int] | None) -> list[int]:
    if setting is None:
        return []
    return setting if isinstance(setting, list) else [setting]
