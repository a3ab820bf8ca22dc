"""A model folder as llama.cpp's converter is to see it: settings that it would guess at or ask for are written out.

A SentencePiece vocabulary puts a space before a text. Older tokenizers of Transformers put one behind every special token
as well, newer ones at the very beginning alone. llama.cpp does the former unless its file says otherwise, so that after
``<|im_start|>`` it would read `` user`` where the model was trained on ``user``. The file says one thing for both places;
the one behind special tokens decides, since every chat prompt begins with one.

llama.cpp stops at the end-of-sequence token and at others whose names it knows. A chat model ends its answers with what
ends a turn, so that is the token the file names; a name like ``</s>`` it knows anyway.

The converter reads the tokens behind a SentencePiece vocabulary from `added_tokens_decoder`, which Transformers 5 no longer
writes, and fails on tokens without a row in the embedding. It asks on the terminal before it runs code of a checkpoint's
own, of which it needs none.
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
_NAMING_TOKENS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json")
_SPACE = "\u2581"


def puts_space_behind_special(tokenizer: Any) -> bool:
    """Say whether text behind a special token begins with a space that is not in it."""
    ids = tokenizer(f"{tokenizer.all_special_tokens[0]}x", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[1]).startswith(_SPACE)


def adds_bos(tokenizer: Any) -> bool:
    """Say whether the tokenizer puts its beginning token before a text, as a program with its file will."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def answer_end(tokenizer: Any) -> str | None:
    """Return the token that a program must stop at: what ends a turn, or else a text; None where there is neither."""
    ends = answer_end_ids(tokenizer)
    return str(tokenizer.convert_ids_to_tokens(ends[-1])) if ends else None


def link_model(model: Path, view: Path, tokenizer: Any, config: Mapping[str, Any]) -> None:
    """Fill a folder with links to a model's files, and with settings that leave nothing to be guessed or missed.

    Args:
        model: its folder.
        view: empty.
        tokenizer: its tokenizer.
        config: content of config.json.

    Raises:
        ExportError: the embedding has no row for a token that is more than an unused one behind the vocabulary.
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
    # only where it must: the converter knows Phi-4 by the class that its file names
    if type(tokenizer) is PreTrainedTokenizerFast and type(AutoTokenizer.from_pretrained(view)) is not type(tokenizer):
        _write(view / TOKENIZER_CONFIG, settings | {"tokenizer_class": FILE_CLASS})
    _leave_out(tokens_without_rows(tokenizer, config), model, view, tokenizer)


def tokens_without_rows(tokenizer: Any, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the tokens that the embedding has no rows for."""
    num_rows = text_config(config).get("vocab_size") or len(tokenizer)
    return {token: i for token, i in tokenizer.get_vocab().items() if i >= num_rows}


def _leave_out(lacking: Mapping[str, int], model: Path, view: Path, tokenizer: Any) -> None:
    """Take tokens out of a view's tokenizer."""
    if not lacking:
        return
    needed = {answer_end(tokenizer), *(tokenizer.bos_token,) * adds_bos(tokenizer)}
    missed = next((token for token in lacking if token in needed or token not in tokenizer.get_added_vocab()), None)
    if missed is not None:
        raise ExportError(
            f"{model}: the embedding has no row for the token {missed!r} ({lacking[missed]}) of the tokenizer; train with "
            f"model.new_tokens: [{missed!r}], or give the tokenizer that belongs to the model"
        )
    for name in _NAMING_TOKENS:
        if (view / name).is_file():
            _write(view / name, _without(_read(view / name), lacking))
    if (view / TOKENIZER).is_file():
        content = _read(view / TOKENIZER)
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in lacking]
        _write(view / TOKENIZER, content)


def _without(value: Any, lacking: Mapping[str, int]) -> Any:
    """Return settings without the entries that are, name or describe a token of `lacking`."""

    def names_one(item: Any) -> bool:
        text = item.get("content") if isinstance(item, dict) else item
        return isinstance(text, str) and text in lacking

    if isinstance(value, dict):
        return {k: _without(v, lacking) for k, v in value.items() if k not in lacking and not names_one(v)}
    if isinstance(value, list):
        return [_without(item, lacking) for item in value if not names_one(item)]
    return value


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file of the view, never through its link into the model."""
    path.unlink(missing_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
