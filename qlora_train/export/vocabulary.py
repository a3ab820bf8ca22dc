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
    ids = tokenizer(f"{tokenizer.eos_token}x", add_special_tokens=False)["input_ids"]
    return str(tokenizer.convert_ids_to_tokens(ids)[1]).startswith(_SPACE)


def link_model(merged: Path, view: Path, tokenizer: Any) -> None:
    """Fill a folder with links to a model's files, and with tokenizer settings that name the space.

    Args:
        merged: the model.
        view: empty.
        tokenizer: the model's.
    """
    for path in merged.iterdir():
        (view / path.name).symlink_to(path.resolve())
    if (merged / SENTENCEPIECE).is_file():
        settings = json.loads((merged / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        settings["add_prefix_space"] = puts_space_behind_special(tokenizer)
        (view / TOKENIZER_CONFIG).unlink()
        (view / TOKENIZER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
