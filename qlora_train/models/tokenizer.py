"""Load the base's tokenizer, and repair what the checkpoint lacks; every repair is logged."""

import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qlora_train.architectures import Architecture, default_chat_template, detect, max_positions
from qlora_train.config import ModelSection
from qlora_train.data.default_chat_templates import resolve_chat_template
from qlora_train.models.base_source import BaseSource
from qlora_train.models.chat_template_files import complete_chat_template
from qlora_train.models.config_file import read_config, untrusted_code
from qlora_train.models.tokenizer_files import check_reloads, follow_tokenizer_json, write_transformers_4_names
from qlora_train.utils.errors import ConfigError, ModelError, first_line

logger = logging.getLogger(__name__)

_PAD_CANDIDATES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
_NO_LIMIT = 1_000_000


def load_tokenizer(source: BaseSource, model: ModelSection) -> PreTrainedTokenizerBase:
    """Load and repair the tokenizer.

    Raises:
        ModelError: no tokenizer, vocabulary or eos token, or a chat template whose end of turn is not one token.
        ConfigError: an unknown `model.chat_template`.
    """
    where = f"model.model_name_or_path: {source.name}"
    config = read_config(source, trust_remote_code=model.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            source.folder, trust_remote_code=model.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        if "trust_remote_code" in str(error):
            raise untrusted_code(f"model.model_name_or_path: the tokenizer of {source.name}") from None
        raise ModelError(
            f"{where} has no usable tokenizer: {type(error).__name__}: "
            f"{first_line(error).rstrip('.')}; download tokenizer.json and tokenizer_config.json again"
        ) from None
    if tokenizer.vocab_size == 0:
        raise ModelError(
            f"{where}: the tokenizer has no vocabulary beside its {len(tokenizer)} added tokens; download "
            "tokenizer.json again"
        )
    tokenizer = follow_tokenizer_json(tokenizer, source.folder, where)
    if model.new_tokens:
        num_added = tokenizer.add_tokens(list(model.new_tokens))
        logger.debug("tokenizer: %d of %d new tokens added", num_added, len(model.new_tokens))
    architecture = detect(source.config)
    if model.chat_template is not None:
        _set_chat_template(tokenizer, model.chat_template)
    else:
        complete_chat_template(tokenizer, source.folder)
    _repair_eos(tokenizer, source)
    _repair_chat_template(tokenizer, architecture)
    _repair_pad(tokenizer, num_embeddings(tokenizer, config, model))
    _repair_length(tokenizer, source.config, architecture)
    return tokenizer


def _set_chat_template(tokenizer: PreTrainedTokenizerBase, name_or_file: str) -> None:
    template = resolve_chat_template(name_or_file)
    reason = "replaces the tokenizer's own" if tokenizer.chat_template else "the tokenizer has none"
    tokenizer.chat_template = template.jinja
    logger.debug("chat template: %s (%s)", name_or_file, reason)
    end = template.end_of_turn
    if end is None:
        return
    ids = tokenizer.encode(end, add_special_tokens=False)
    if len(ids) != 1:
        raise ModelError(
            f"model.chat_template: {name_or_file} ends a turn with {end!r}, which is {len(ids)} tokens of this "
            f"tokenizer; use a template of the model's family, or add the token: model.new_tokens: ['{end}']"
        )
    if tokenizer.eos_token != end:
        logger.debug("tokenizer: eos token %r -> %r (ends a turn of the chat template)", tokenizer.eos_token, end)
        tokenizer.eos_token = end


def _repair_chat_template(tokenizer: PreTrainedTokenizerBase, architecture: Architecture) -> None:
    """Set the default chat template of the model's family, without changing the eos token: rows may be plain text."""
    if isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template:
        raise ModelError(
            f"model.model_name_or_path: the tokenizer has the chat templates {', '.join(tokenizer.chat_template)} and "
            "no default one; set model.chat_template"
        )
    if tokenizer.chat_template is not None:
        return
    name = default_chat_template(architecture, tokenizer.get_vocab())
    template = resolve_chat_template(name)
    if template.end_of_turn is not None and template.end_of_turn not in tokenizer.get_vocab():
        template = template.ending_with(tokenizer.eos_token)
    tokenizer.chat_template = template.jinja
    logger.info(
        "chat template: %s, turns end with %r (the tokenizer has none, see model.chat_template)",
        name, template.end_of_turn or tokenizer.eos_token,
    )  # fmt: skip


def _repair_eos(tokenizer: PreTrainedTokenizerBase, source: BaseSource) -> None:
    if tokenizer.eos_token_id is not None:
        return
    eos = source.config.get("eos_token_id")
    eos_id = eos[0] if isinstance(eos, list) and eos else eos
    if not isinstance(eos_id, int) or eos_id >= len(tokenizer):
        raise ModelError(
            f"model.model_name_or_path: {source.name}: neither the tokenizer nor config.json has an eos token, which the "
            "model needs to learn to stop; set eos_token in tokenizer_config.json"
        )
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos_id)
    logger.debug("tokenizer: eos token %r (from config.json)", tokenizer.eos_token)


def num_embeddings(tokenizer: PreTrainedTokenizerBase, config: Any, model: ModelSection) -> int:
    """Return the number of embedding rows of the trained model, which grows for `model.new_tokens` alone."""
    num_rows = int(config.get_text_config().vocab_size)
    return max(num_rows, len(tokenizer)) if model.new_tokens else num_rows


def _repair_pad(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> None:
    pad, pad_id = tokenizer.pad_token, tokenizer.pad_token_id
    if pad_id is not None and pad_id < num_rows:
        return
    vocabulary = tokenizer.get_vocab()
    candidates = (token for token in _PAD_CANDIDATES if vocabulary.get(token, num_rows) < num_rows)
    tokenizer.pad_token = next((token for token in candidates if token != tokenizer.eos_token), tokenizer.eos_token)
    reason = "it had none" if pad_id is None else f"{pad!r} ({pad_id}) is beyond the {num_rows} embedding rows"
    logger.debug("tokenizer: pad token %r (%s)", tokenizer.pad_token, reason)


def _repair_length(tokenizer: PreTrainedTokenizerBase, config: dict[str, Any], architecture: Architecture) -> None:
    positions = max_positions(config, architecture)
    if tokenizer.model_max_length > _NO_LIMIT and positions is not None:
        tokenizer.model_max_length = positions
        logger.debug("tokenizer: model_max_length %d (from config.json)", positions)


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Save the tokenizer with its chat templates beside a model or an adapter.

    Raises:
        ModelError: AutoTokenizer reloads a different tokenizer.
    """
    tokenizer.save_pretrained(folder)
    write_transformers_4_names(folder)
    check_reloads(tokenizer, folder, trust_remote_code=trust_remote_code)


def check_can_be_saved(
    tokenizer: PreTrainedTokenizerBase, base_folder: Path, *, merged: bool, trust_remote_code: bool
) -> None:
    """Check before training that a saved tokenizer will reload unchanged.

    Args:
        merged: whether a merged folder will be written, where AutoTokenizer also reads config.json.

    Raises:
        ConfigError: AutoTokenizer reloads a different tokenizer.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file in [*base_folder.glob("*.py"), *([base_folder / "config.json"] if merged else [])]:
            shutil.copyfile(file, folder / file.name)
        try:
            save_tokenizer(tokenizer, folder, trust_remote_code=trust_remote_code)
        except ModelError as error:
            where = (
                "export.merge: from a merged folder" if merged else "model.model_name_or_path: from an adapter's folder"
            )
            remedy = "set export.merge: false and use the adapter" if merged else "use another tokenizer"
            raise ConfigError(
                f"{where} {error}; Transformers {version('transformers')} builds the tokenizer by its class; {remedy}"
            ) from None
