"""Keep tokenizers equal to tokenizer.json: when a base is loaded, and when a saved folder is reloaded.

Transformers 5 builds a tokenizer by its class and reads only vocabulary and merges from tokenizer.json: normalizer and
pre-tokenizer are the class's. If they differ, the base was trained with the file's. Saving also loses settings
(`legacy`), so that saved folders are reloaded and compared."""

import json
import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from qlora_train.models.token_probes import TokenProbe, differences, encode, hard_texts
from qlora_train.utils.errors import ModelError, first_line

logger = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
FILE_CLASS = "PreTrainedTokenizerFast"
"""The class that reads tokenizer.json unchanged, by a name known to Transformers 4 and 5."""
_BPE_SETTINGS = ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "ignore_merges")
READ_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError)
"""Exceptions of Transformers for unreadable tokenizer files."""


def follow_tokenizer_json(tokenizer: PreTrainedTokenizerBase, folder: Path, where: str) -> PreTrainedTokenizerBase:
    """Return `tokenizer`, or one that reads tokenizer.json unchanged if the class of `tokenizer` does not.

    Args:
        tokenizer: AutoTokenizer's result for `folder`.
        where: prefix of error messages.

    Raises:
        ModelError: no class of Transformers reads the file unchanged.
    """
    path = folder / TOKENIZER
    if not tokenizer.is_fast or not path.is_file() or not type(tokenizer).__module__.startswith("transformers."):
        return tokenizer  # nothing to compare with, or remote code
    file = Tokenizer.from_file(str(path))
    follows = _follows(tokenizer, file)
    if follows and len(tokenizer) == file.get_vocab_size() and _have_equal_ids(tokenizer, file):
        return tokenizer
    exact = PreTrainedTokenizerFast.from_pretrained(
        folder, local_files_only=True, padding_side=tokenizer.padding_side,
        model_input_names=tokenizer.model_input_names,
    )  # fmt: skip
    texts = hard_texts(exact)
    _check_exact(exact, file, texts, where)
    others = differences(tokenizer, [TokenProbe.of(exact, text) for text in texts], limit=1)
    if not others and follows and len(tokenizer) == len(exact):
        return tokenizer
    reason = f"gives {others[0]}" if others else "changes it"
    logger.debug("tokenizer: %s unchanged (%s %s)", TOKENIZER, type(tokenizer).__name__, reason)
    return exact


def _check_exact(exact: PreTrainedTokenizerBase, file: Tokenizer, texts: list[str], where: str) -> None:
    """Refuse a tokenizer that differs from its file, except for tokens added by tokenizer_config.json."""
    added = exact.get_vocab().keys() - file.get_vocab().keys()
    for text in texts:
        expected, actual = _ids(file, text), encode(exact, text)
        if actual != expected and not any(token in text for token in added):
            raise ModelError(
                f"{where}: Transformers {version('transformers')} changes {TOKENIZER}: {text!r} becomes {list(actual)}, in "
                f"the file {list(expected)}; install another version"
            )


def _have_equal_ids(tokenizer: PreTrainedTokenizerBase, file: Tokenizer) -> bool:
    return all(encode(tokenizer, text) == _ids(file, text) for text in hard_texts(tokenizer))


def _ids(file: Tokenizer, text: str) -> tuple[int, ...]:
    file.no_truncation()
    file.no_padding()
    return tuple(file.encode(text, add_special_tokens=False).ids)


def _follows(tokenizer: PreTrainedTokenizerBase, file: Tokenizer) -> bool:
    """Whether a tokenizer has the normalizer, pre-tokenizer, model settings and added tokens of a file."""
    backend = tokenizer.backend_tokenizer
    return (
        _state(backend.normalizer) == _state(file.normalizer)
        and _state(backend.pre_tokenizer) == _state(file.pre_tokenizer)
        and type(backend.model) is type(file.model)
        and all(
            (getattr(backend.model, k, None) or None) == (getattr(file.model, k, None) or None) for k in _BPE_SETTINGS
        )
        and _added(file).items() <= _added(backend).items()
    )


def _added(file: Tokenizer) -> dict[int, tuple[object, ...]]:
    """Return the matching rules of added tokens by id."""
    tokens = file.get_added_tokens_decoder().items()
    return {i: (t.content, t.lstrip, t.rstrip, t.single_word, t.normalized) for i, t in tokens}


def _state(part: Any) -> bytes | None:
    return None if part is None else part.__getstate__()


def check_reloads(tokenizer: PreTrainedTokenizerBase, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Compare a tokenizer with its saved files as AutoTokenizer reloads them.

    If they differ, the files are changed to name the class that reads tokenizer.json unchanged.

    Raises:
        ModelError: they still differ.
    """
    texts = hard_texts(tokenizer)
    probes = [TokenProbe.of(tokenizer, text, add_special_tokens=special) for special in (False, True) for text in texts]
    found = _difference(tokenizer, folder, probes, trust_remote_code)
    if found is not None and type(tokenizer).__module__.startswith("transformers."):
        _name_file_class(tokenizer, folder)
        found = _difference(tokenizer, folder, probes, trust_remote_code)
    if found is not None:
        raise ModelError(f"AutoTokenizer reloads a different tokenizer: {found}")


def _difference(
    tokenizer: PreTrainedTokenizerBase, folder: Path, probes: list[TokenProbe], trust_remote_code: bool
) -> str | None:
    """Return the first difference between a tokenizer and its files."""
    try:
        again = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except READ_ERRORS as error:
        return f"{type(error).__name__}: {first_line(error)}"
    for name in ("bos_token", "eos_token", "pad_token", "chat_template", "model_input_names"):
        expected, actual = getattr(tokenizer, name), getattr(again, name)
        if actual != expected:
            return f"{name} is {actual!r} instead of {expected!r}"
    return next(iter(differences(again, probes, limit=1)), None)


def _name_file_class(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    path = folder / TOKENIZER_CONFIG
    content = json.loads(path.read_text(encoding="utf-8"))
    content["tokenizer_class"] = FILE_CLASS
    # defaults of the previous class
    content["model_input_names"], content["padding_side"] = tokenizer.model_input_names, tokenizer.padding_side
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_transformers_4_names(folder: Path) -> None:
    """Rewrite tokenizer_config.json of a folder, if any, with names that Transformers 4 reads as Transformers 5 does."""
    path = folder / TOKENIZER_CONFIG
    if not path.is_file():
        return
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("tokenizer_class") == "TokenizersBackend":
        content["tokenizer_class"] = FILE_CLASS
    if isinstance(content.get("extra_special_tokens"), list):  # Transformers 4 fails on a list
        content["additional_special_tokens"] = content.pop("extra_special_tokens")
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
