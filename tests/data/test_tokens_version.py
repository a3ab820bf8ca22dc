"""The cache finds tokens by TOKENS_VERSION: it must change when the same data gives other tokens or masks."""

import datetime
import hashlib
import json
from pathlib import Path

from qlora_train.config import DataSection
from qlora_train.data import prepare_data
from qlora_train.data.stored_columns import schema
from qlora_train.data.token_cache import TOKENS_VERSION
from qlora_train.utils.errors import DataError
from tests.support.pico import build_tokenizer

SETTINGS = [
    *({"train_on": train_on} for train_on in ("assistant", "last", "all", "completion")),
    *({"max_length": 24, "overflow": overflow} for overflow in ("drop", "truncate", "keep_end", "keep_answer", "split")),
]  # fmt: skip
TURNS = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi \u00e9!"},
    {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "How\nare you?"},
    {"role": "assistant", "content": "Fine, thanks. And you? \U0001f600"},
]  # fmt: skip
ROWS = {
    "messages": [{"messages": TURNS}, {"messages": [TURNS[1], {**TURNS[2], "weight": 0}, *TURNS[3:]]}],
    "prompts": [{"prompt": "one ", "completion": "two"}, {"prompt": "one " * 30, "completion": "two " * 5}],
    "alpaca": [{"instruction": "Add.", "input": "1 2", "output": "3"}],
    "text": [{"text": "Plain text."}, {"text": "word " * 40}],
    "tokens": [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}],
}
GOLDEN = (5, "cebc554bba0582ed7f43cc0d9de7f2f57aece37251f50105f0976cabb82259e7")
"""TOKENS_VERSION and the hash of its tokens, masks and texts for ROWS, and of a store's layout."""


def test_the_version_changes_with_the_tokens(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    digest = hashlib.sha256(str([(column.name, str(column.type)) for column in schema(1000)]).encode())
    for name, rows in ROWS.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for settings in SETTINGS:
            section = DataSection.model_validate({"train": str(file), "max_dropped": 0.9, **settings})
            try:
                data = prepare_data(section, tokenizer, 0, date=datetime.date(2026, 1, 1))
            except DataError:  # no row fits
                digest.update(b"none")
                continue
            for row in data.train:  # type: ignore[union-attr]
                content = [row.input_ids.tolist(), row.loss_mask.tolist(), row.prompt, row.answer]
                digest.update(json.dumps(content).encode())
    assert (TOKENS_VERSION, digest.hexdigest()) == GOLDEN, "raise TOKENS_VERSION, then update GOLDEN"
