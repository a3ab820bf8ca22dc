"""A pico model with a SentencePiece vocabulary, which llama.cpp's converter knows without a table of hashes."""

import json
from pathlib import Path
from typing import Any

import sentencepiece
from transformers import AutoTokenizer

from tests.support.pico import CHATML, CORPUS, TURN_END, TURN_START, build_pico


def sentencepiece_pico(folder: Path, model_type: str = "llama", *, turns: str = "behind", **settings: Any) -> Path:
    """Build the model.

    Args:
        turns: how the vocabulary holds what begins and ends a turn: as "user_defined" symbols, which are plain tokens to
            the converter, or "behind" itself, as Transformers 4 writes added tokens.
    """
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **({} if turns == "behind" else {f"{turns}_symbols": [TURN_START, TURN_END]}),
    )
    first = (
        sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model")).vocab_size() if turns == "behind" else 3
    )
    about = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "eos_token": TURN_END, "legacy": False,
        "added_tokens_decoder": {
            str(i): {"content": token, "special": True} for i, token in enumerate((TURN_START, TURN_END), first)
        },
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    (folder / "chat_template.jinja").write_text("{{ bos_token }}" + CHATML)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = build_pico(
        folder / "model",
        model_type,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **settings,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (model / name).unlink()
    for name in ("tokenizer.model", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).rename(model / name)
    return model
