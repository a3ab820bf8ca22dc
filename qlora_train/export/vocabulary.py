"""What a converter does not find in the files of a tokenizer and would guess at.

A SentencePiece vocabulary puts a space before a text. Older tokenizers of Transformers put one behind every special token
as well, newer ones at the very beginning alone. llama.cpp does the former unless its file says otherwise, so that after
``<|im_start|>`` it would read `` user`` where the model was trained on ``user``. The file says one thing for both places;
the one behind special tokens decides, since every chat prompt begins with one.

llama.cpp stops at the end-of-sequence token and at others whose names it knows. A chat model ends its answers with what
ends a turn, so that is the token the file names; a name like ``</s>`` it knows anyway.
"""

import json
from pathlib import Path
from typing import Any

from qlora_train.evaluate import answer_ends
from qlora_train.export.companions import SENTENCEPIECE
from qlora_train.export.old_names import with_old_names

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
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
    ends = answer_ends(tokenizer)
    return str(tokenizer.convert_ids_to_tokens(ends[-1])) if ends else None


def link_model(model: Path, view: Path, tokenizer: Any) -> None:
    """Fill a folder with links to a model's files, and with settings that leave nothing to be guessed or missed.

    Args:
        model: its folder.
        view: empty.
        tokenizer: its tokenizer.
    """
    for path in model.iterdir():
        (view / path.name).symlink_to(path.resolve())
    config = json.loads((model / CONFIG).read_text(encoding="utf-8"))
    (view / CONFIG).unlink()
    (view / CONFIG).write_text(json.dumps(with_old_names(config)), encoding="utf-8")
    if not (model / TOKENIZER_CONFIG).is_file():
        return
    settings = json.loads((model / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
    if end := answer_end(tokenizer):
        settings["eos_token"] = end
    if (model / SENTENCEPIECE).is_file():
        settings["add_prefix_space"] = puts_space_behind_special(tokenizer)
    (view / TOKENIZER_CONFIG).unlink()
    (view / TOKENIZER_CONFIG).write_text(json.dumps(settings), encoding="utf-8")
