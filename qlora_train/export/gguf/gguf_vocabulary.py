"""Prepare a model folder for llama.cpp's converter: write out the settings that it would guess, ask for or miss.

Spaces: a SentencePiece vocabulary puts a space before a text. Older Transformers tokenizers also put one after every
special token, newer ones only at the start. llama.cpp does the former by default, so that after ``<|im_start|>`` it would
read `` user`` instead of ``user``. The file has one setting for both cases; the one after special tokens decides, since
every chat prompt begins with a special token.

End of text: llama.cpp stops at the eos token and at some tokens that it knows by name. A chat model ends its answers with
the end-of-turn token, so the file names that one.

The converter reads tokens that were added to a SentencePiece vocabulary from `added_tokens_decoder`, which Transformers 5
does not write, and fails on tokens without an embedding row. It asks on the terminal before it runs a checkpoint's own
code, which it does not need.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qlora_train.architectures import text_config
from qlora_train.evaluation.generation import answer_end_ids
from qlora_train.export.merging.auxiliary_files import SENTENCEPIECE
from qlora_train.export.merging.legacy_config import for_converter
from qlora_train.models.tokenizer_files import FILE_CLASS
from qlora_train.utils.errors import ExportError

CONFIG = "config.json"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
_TOKEN_FILES = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_SPACE = "\u2581"


def puts_space_behind_special(tokenizer: Any) -> bool:
    """Return whether the tokenizer inserts a space after a special token."""
    ids = tokenizer(f"{tokenizer.all_special_tokens[0]}x", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[1]).startswith(_SPACE)


def adds_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer adds the bos token before a text."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def answer_end(tokenizer: Any) -> str | None:
    """Return the end-of-turn token, else the eos token, else None."""
    ends = answer_end_ids(tokenizer)
    return str(tokenizer.convert_ids_to_tokens(ends[-1])) if ends else None


def link_model(model: Path, view: Path, tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Fill the empty folder `view` with links to a model's files and with complete settings for the converter.

    Raises:
        ExportError: a token in use has no embedding row.
    """
    for path in model.iterdir():
        if path.suffix != ".py":
            (view / path.name).symlink_to(path.resolve())
    _write(view / CONFIG, for_converter({key: value for key, value in config.items() if key != "auto_map"}))
    if not (model / TOKENIZER_CONFIG).is_file():
        return
    settings = _read(model / TOKENIZER_CONFIG)
    settings.pop("auto_map", None)
    if end := answer_end(tokenizer):
        settings["eos_token"] = end
    if (model / SENTENCEPIECE).is_file():
        settings["add_prefix_space"] = puts_space_behind_special(tokenizer)
        settings["added_tokens_decoder"] = {
            str(i): {"content": token.content, "special": token.special}
            for i, token in tokenizer.added_tokens_decoder.items()
        }
    _write(view / TOKENIZER_CONFIG, settings)
    # only if necessary: the converter recognises Phi-4 by its tokenizer class
    if type(tokenizer) is PreTrainedTokenizerFast and type(AutoTokenizer.from_pretrained(view)) is not type(tokenizer):
        _write(view / TOKENIZER_CONFIG, settings | {"tokenizer_class": FILE_CLASS})
    _remove_tokens(tokens_without_rows(tokenizer, config), model, view, tokenizer)


def tokens_without_rows(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens beyond the embedding."""
    num_rows = text_config(config).get("vocab_size") or len(tokenizer)
    return {token: i for token, i in tokenizer.get_vocab().items() if i >= num_rows}


def _remove_tokens(removed: Mapping[str, int], model: Path, view: Path, tokenizer: Any) -> None:
    if not removed:
        return
    in_use = {answer_end(tokenizer), *(tokenizer.bos_token,) * adds_bos(tokenizer)}
    needed = next((token for token in removed if token in in_use or token not in tokenizer.get_added_vocab()), None)
    if needed is not None:
        raise ExportError(
            f"{model}: the embedding has no row for the token {needed!r} ({removed[needed]}) of the tokenizer; train with "
            f"model.new_tokens: [{needed!r}], or give the tokenizer that belongs to the model"
        )
    for name in _TOKEN_FILES:
        if (view / name).is_file():
            _write(view / name, _without(_read(view / name), removed))
    if (view / TOKENIZER).is_file():
        content = _read(view / TOKENIZER)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in removed]
        _write(view / TOKENIZER, content)


def _without(value: Any, removed: Mapping[str, int]) -> Any:
    """Drop the entries of JSON data that are, name or describe a removed token."""

    def names_one(item: Any) -> bool:
        text = item.get("content") if isinstance(item, dict) else item
        return isinstance(text, str) and text in removed

    if isinstance(value, dict):
        return {k: _without(v, removed) for k, v in value.items() if k not in removed and not names_one(v)}
    if isinstance(value, list):
        return [_without(item, removed) for item in value if not names_one(item)]
    return value


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.unlink(missing_ok=True)  # never write through the link into the model
    path.write_text(json.dumps(content), encoding="utf-8")
