"""The tokenizer's files: what a base's tokenizer.json says, and folders that reload to the tokens of the run.

Transformers 5 builds a tokenizer by its class name and takes only vocabulary and merges from tokenizer.json: normalizer
and split rule are the class's own. Where these differ, the base was trained on the file's. Saving loses settings too
(`legacy`), so that what was written is read again and compared.
"""

import json
import logging
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_train.errors import ModelError, first_line
from qlora_train.loader.token_probes import TokenProbe, differences, hard_texts

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILE_CLASS = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is, by the name that Transformers 4 and 5 know."""
_BPE_SETTINGS = (
    "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback",
    "ignore_merges",
)  # fmt: skip
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)
"""What Transformers raises for tokenizer files that it cannot read."""


def as_file_says(tokenizer: PreTrainedTokenizerBase, folder: Path, where: str) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or one that takes tokenizer.json as it is where the class of `tokenizer` does not.

    Args:
        tokenizer: AutoTokenizer's result.
        folder: where it was loaded from.
        where: beginning of messages.

    Raises:
        ModelError: Transformers cannot load the file without changing it.
    """
    path = folder / TOKENIZER
    if not tokenizer.is_fast or not path.is_file() or not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer  # nothing to compare with, or the checkpoint's own code
    file = Tokenizer.from_file(str(path))
    if _follows(tokenizer, file) and len(tokenizer) == file.get_vocab_size():
        return tokenizer
    exact = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
    )  # fmt: skip
    changed = [probe for text in hard_texts(exact) if (probe := TokenProbe.of(exact, text)).ids != _ids(file, text)]
    declared = exact.get_vocab().keys() - file.get_vocab().keys()
    wrong = [probe for probe in changed if not any(token in probe.text for token in declared)]
    if wrong:
        raise ModelError(
            f"{where}: Transformers does not load {TOKENIZER} as it is: {wrong[0].text!r} is {list(_ids(file, wrong[0].text))} "
            f"in the file and {list(wrong[0].ids)} as loaded; install another version of transformers"
        )
    others = differences(tokenizer, [TokenProbe.of(exact, text) for text in hard_texts(exact)], limit=1)
    if not others and _follows(tokenizer, file) and len(tokenizer) == len(exact):
        return tokenizer
    reason = f"{type(tokenizer).__name__} gives {others[0]}" if others else f"{type(tokenizer).__name__} changes it"
    logger.info("tokenizer: %s as it is (%s)", TOKENIZER, reason)
    return exact


def _ids(file: Tokenizer, text: str) -> tuple[int, ...]:
    file.no_truncation()
    file.no_padding()
    return tuple(file.encode(text, add_special_tokens=False).ids)


def _follows(tokenizer: PreTrainedTokenizerBase, file: Tokenizer) -> bool:
    """Say whether a tokenizer has the normalizer, split rule and model settings of a file."""
    backend = tokenizer.backend_tokenizer
    return (
        _state(backend.normalizer) == _state(file.normalizer)
        and _state(backend.pre_tokenizer) == _state(file.pre_tokenizer)
        and type(backend.model) is type(file.model)
        and all(getattr(backend.model, name, None) == getattr(file.model, name, None) for name in _BPE_SETTINGS)
    )


def _state(part: Any) -> bytes | None:
    return None if part is None else part.__getstate__()


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, *, trust_remote_code: bool = False
) -> None:
    """Write a tokenizer with its chat templates beside a model or an adapter; AutoTokenizer reloads it to the same tokens.

    Raises:
        ModelError: no files of this tokenizer reload to the same tokens.
    """
    tokenizer.save_pretrained(folder)
    if type(tokenizer) is PreTrainedTokenizerFast:
        _name_file_class(tokenizer, folder)  # Transformers 4 does not know the class by its new name
    check_reloads(tokenizer, folder, trust_remote_code=trust_remote_code)


def check_reloads(tokenizer: PreTrainedTokenizerBase, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Make tokenizer files reload to the tokens of `tokenizer`, by naming the class that takes tokenizer.json as it is.

    Raises:
        ModelError: they do not.
    """
    probes = [TokenProbe.of(tokenizer, text, add_special_tokens=flag) for flag in (False, True) for text in hard_texts(tokenizer)]
    if not (found := _lost(tokenizer, folder, probes, trust_remote_code)):
        return
    if type(tokenizer).__module__.startswith("transformers."):
        _name_file_class(tokenizer, folder)
        if not (found := _lost(tokenizer, folder, probes, trust_remote_code)):
            return
    raise ModelError(
        f"{folder.name}: the tokenizer as written reloads with AutoTokenizer to other tokens than the run's: {found}; "
    )


def _lost(
    tokenizer: PreTrainedTokenizerBase, folder: Path, probes: list[TokenProbe], trust_remote_code: bool
) -> str | None:
    """Return the first difference between a tokenizer and its files; None where they are equal."""
    try:
        again = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except READ_ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)}"
    for name in ("special_tokens_map", "chat_template", "model_input_names"):
        expected, actual = getattr(tokenizer, name), getattr(again, name)
        if actual != expected:
            return f"{name} is {actual!r} instead of {expected!r}"
    return next(iter(differences(again, probes, limit=1)), None)


def _name_file_class(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    path = folder / TOKENIZER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tokenizer_class"] = FILE_CLASS
    content["model_input_names"], content["padding_side"] = tokenizer.model_input_names, tokenizer.padding_side
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
