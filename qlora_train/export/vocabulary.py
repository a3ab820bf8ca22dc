"""What a converter does not find in the files of a tokenizer and would guess at.

A SentencePiece vocabulary puts a space before a text. Older tokenizers of Transformers put one behind every special token
as well, newer ones at the very beginning alone. llama.cpp does the former unless its file says otherwise, so that after
``<|im_start|>`` it would read `` user`` where the model was trained on ``user``. The file says one thing for both places;
the one behind special tokens decides, since every chat prompt begins with one.
"""

import json
from pathlib import Path
from typing import Any

from qlora_train.export.companions import SENTENCEPIECE

TOKENIZER_CONFIG = "tokenizer_config.json"
_SPACE = "\u2581"


def puts_space_behind_special(tokenizer: Any) -> bool:
    """Say whether text behind a special token begins with a space that is not in it."""
    ids = tokenizer(f"{tokenizer.all_special_tokens[0]}x", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[1]).startswith(_SPACE)


def adds_bos(tokenizer: Any) -> bool:
    """Say whether the tokenizer puts its beginning token before a text, as a program with its file will."""
    return tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id


def link_model(model: Path, view: Path, tokenizer: Any) -> None:
    """Fill a folder with links to a model's files, and with tokenizer settings that name the space.

    Args:
        model: its folder.
        view: empty.
        tokenizer: its tokenizer.
    """
    for path in model.iterdir():
        (view / path.name).symlink_to(path.resolve())
    if (model / SENTENCEPIECE).is_file():
        settings = json.loads((model / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        settings["add_prefix_space"] = puts_space_behind_special(tokenizer)
        (view / TOKENIZER_CONFIG).unlink()
        (view / TOKENIZER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
