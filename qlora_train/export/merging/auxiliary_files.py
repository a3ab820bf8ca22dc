"""All of a merged folder but its weights: config, generation settings, tokenizer, and code that the config refers to.

A fine-tuned model ends its answers with the tokens that it was trained to end them with, and the base often names
others: a base model's eos is rarely what ends a turn of a chat template. An engine that knows only the base's would
never stop, so the written files name both.
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
"""How images and sound are prepared for the towers that the merge copies."""


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
    """Complete `folder`, which holds the merged weights, to a model folder.

    Args:
        base_folder: gives code, and whatever of tokenizer and generation settings the adapter's folder has not.
        adapter_folder: its tokenizer is taken as a whole, its generation settings likewise.
        config: Transformers config of the model; changed to what the weights are.
        tied: whether embedding and head are one matrix.
        num_embeddings: rows of the embedding.
        dtype: of the weights; None where they are as the base's config says.
        trust_remote_code: run the tokenizer's own code.
    """
    text = config.get_text_config()
    config.dtype, config._name_or_path = dtype or config.dtype, ""
    text.tie_word_embeddings = config.tie_word_embeddings = tied
    text.vocab_size = num_embeddings
    for code in base_folder.glob("*.py"):
        shutil.copyfile(code, folder / code.name)
    for file in (base_folder / name for name in _PROCESSOR_FILES):
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    tokenizer = _copy_tokenizer(base_folder, adapter_folder, folder, config, trust_remote_code)
    write_transformers_4_names(folder)
    generation = _generation_settings(adapter_folder, base_folder)
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
    """Return `eos_token_id` and `pad_token_id` as both files name them, each where there is one.

    Args:
        tokenizer: what ends its answers comes first, before what ended the base's; None where there is none.
        text_config: Transformers config with the final vocabulary size.
        generation: the generation settings so far.
    """
    special: dict[str, int | list[int]] = {}
    ends = [*_ids(generation.get("eos_token_id")), *_ids(getattr(text_config, "eos_token_id", None))]
    if tokenizer is not None:
        ends = [*answer_end_ids(tokenizer), *ends]
        # an id beyond the embedding would keep the model from loading
        if tokenizer.pad_token_id is not None and tokenizer.pad_token_id < text_config.vocab_size:
            special["pad_token_id"] = tokenizer.pad_token_id
    different = list(dict.fromkeys(ends))
    if different:
        special["eos_token_id"] = different if len(different) > 1 else different[0]
    return special


def _copy_tokenizer(base_folder: Path, adapter_folder: Path, folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Copy the tokenizer as a whole from one side, and return it as that side's files say; None without one.

    A fast tokenizer saves no copy of SentencePiece's file, without whose scores other programs split text differently.
    """
    source = adapter_folder if (adapter_folder / "tokenizer_config.json").is_file() else base_folder
    files = [source / name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not files:
        return None
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


def _generation_settings(adapter_folder: Path, base_folder: Path) -> dict[str, Any]:
    """Return the content of the first generation_config.json, or nothing when neither side has one."""
    for side in (adapter_folder, base_folder):
        path = side / GENERATION_CONFIG
        if path.is_file():
            content = _read_mapping(path)
            # left in, it makes Transformers take the tokens from config.json again
            content.pop("_from_model_config", None)
            return content
    return {}


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MergeError(f"{path}: not readable as JSON ({error}); restore it") from None
    if not isinstance(content, dict):
        raise MergeError(f"{path}: holds no mapping; restore it")
    return content


def _ids(setting: int | list[int] | None) -> list[int]:
    if setting is None:
        return []
    return setting if isinstance(setting, list) else [setting]
