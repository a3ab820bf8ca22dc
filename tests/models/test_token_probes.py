"""Token probes: a tokenizer that differs from the run's shows, also to a process that has only the probes' file."""

import copy
import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from qlora_train.data.chat_template import encode_chat
from qlora_train.data.types import Example
from qlora_train.models.token_probes import TokenProbe, differences, load_probes, run_probes, save_probes
from tests.support.pico import build_tokenizer

DATE = datetime.date(2024, 5, 31)


def example(ids: list[int], prompt: Any = None, answer: str | None = None) -> Example:
    return Example("rows.jsonl:1", np.array(ids, np.int32), np.ones(len(ids), np.bool_), prompt, answer)


@pytest.fixture
def tokenizer() -> Any:
    return build_tokenizer()


def rows_of(tokenizer: Any) -> list[Example]:
    question = ({"role": "user", "content": "12 + 3456"},)
    ids = encode_chat(tokenizer, [*question, {"role": "assistant", "content": "3468"}], date=DATE)
    return [example(ids, question, "3468"), example(ids), example(tokenizer("the quick")["input_ids"], "the ", "quick")]


def test_probes_are_saved_and_the_same_tokenizer_passes(tokenizer: Any, tmp_path: Path) -> None:
    probes = run_probes(tokenizer, rows_of(tokenizer), date=DATE)
    assert probes[-3].messages is not None, "a conversation is probed from its messages"
    assert probes[-3].ids == probes[-2].ids == tuple(rows_of(tokenizer)[0].input_ids.tolist())
    save_probes(tmp_path / "probes.json", probes)
    read = load_probes(tmp_path / "probes.json")
    assert read == probes
    tokenizer.save_pretrained(tmp_path)
    assert differences(type(tokenizer).from_pretrained(tmp_path), read) == []


def test_other_pre_tokenizer_shows_text_and_tokens(tokenizer: Any) -> None:
    other = copy.deepcopy(tokenizer)
    digits = pre_tokenizers.Digits(individual_digits=True)
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, tokenizer.backend_tokenizer.pre_tokenizer])
    found = differences(other, [TokenProbe.of(tokenizer, "x 12"), TokenProbe.of(tokenizer, "x")])
    assert found == ["'x 12', token 2: '1' (20) '2' (21) instead of '12' (295)"]
    assert differences(other, run_probes(tokenizer, rows_of(tokenizer), date=DATE), limit=1)


def test_other_chat_template_shows_where_it_differs(tokenizer: Any) -> None:
    probes = run_probes(tokenizer, rows_of(tokenizer), date=DATE)
    tokenizer.chat_template = tokenizer.chat_template.replace("'<|im_end|>'", "'<|endoftext|>'")
    [found] = differences(tokenizer, probes)
    assert found.startswith("the chat template writes '2 + 3456<|endoftext|>")
    assert "instead of '2 + 3456<|im_end|>" in found
