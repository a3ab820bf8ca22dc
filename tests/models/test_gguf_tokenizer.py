"""The tokenizer of a GGUF file splits text as llama.cpp and as the tokenizer that the file was made of."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import pytest
from tokenizers import Tokenizer

from qlora_train.architectures.gguf_header import read_header
from qlora_train.models.gguf_tokenizer import SPLITS, gguf_tokenizer
from qlora_train.models.token_probes import HARD_STRINGS
from qlora_train.utils.errors import ModelError
from tests.support.gguf_files import write_vocabulary
from tests.support.imported_converter import LLAMA_CPP
from tests.support.tokenizer_grid import BYTE_LEVEL, TEXTS, trained

pytest.importorskip("xllamacpp")
from qlora_train.export.gguf.llama_process import tokenize_file

PROBES = [*TEXTS, *HARD_STRINGS]
SENTENCEPIECE = {"prepend": True, "never": False}
"""Split rules that llama.cpp has too, with `add_space_prefix`."""


def ids_of(path: Path) -> list[list[int]]:
    tokenizer = gguf_tokenizer(read_header(path))
    return [tokenizer(text, add_special_tokens=False).input_ids for text in PROBES]


@pytest.mark.parametrize("rule", [*BYTE_LEVEL, *SENTENCEPIECE])
def test_tokens_equal_those_of_the_original_tokenizer(rule: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pre": LLAMA_CPP[rule]} if rule in BYTE_LEVEL else {"space": SENTENCEPIECE[rule]}
    path = write_vocabulary(tmp_path / "pico.gguf", Tokenizer.from_str(trained(rule)), **settings)
    original = Tokenizer.from_str(trained(rule))
    texts = [text for text in PROBES if rule != "qwen2" or text.isascii()]  # llama.cpp does not normalize
    ours = dict(zip(PROBES, ids_of(path), strict=True))
    assert [text for text in texts if ours[text] != original.encode(text, add_special_tokens=False).ids] == []


@pytest.mark.parametrize("pre", sorted({split: name for name, split in SPLITS.items()}.values()))
def test_every_split_rule_gives_the_tokens_of_llama_cpp(pre: str, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "pico.gguf", Tokenizer.from_str(trained("gpt2")), pre=pre)
    expected = tokenize_file(path, PROBES)
    assert expected is not None
    pairs = zip(PROBES, ids_of(path), expected, strict=True)
    assert [(text, ours, theirs) for text, ours, theirs in pairs if ours != theirs] == []


def test_unknown_split_rule_is_refused(tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "pico.gguf", Tokenizer.from_str(trained("gpt2")), pre="new-rule")
    with pytest.raises(ModelError, match="pre: 'new-rule'"):
        gguf_tokenizer(read_header(path))


def test_vocabulary_without_scores_is_refused(tmp_path: Path) -> None:
    header = read_header(write_vocabulary(tmp_path / "pico.gguf", Tokenizer.from_str(trained("never")), space=False))
    settings = {key: value for key, value in header._all_settings.items() if key != gguf.Keys.Tokenizer.SCORES}
    with pytest.raises(ModelError, match="no scores"):
        gguf_tokenizer(dataclasses.replace(header, _all_settings=settings))


@pytest.mark.parametrize("adds", [True, False])
def test_bos_is_added_if_the_file_says_so(adds: bool, tmp_path: Path) -> None:
    path = write_vocabulary(tmp_path / "pico.gguf", Tokenizer.from_str(trained("never")), space=False, bos=adds)
    tokenizer = gguf_tokenizer(read_header(path))
    assert (tokenizer("the").input_ids[0] == tokenizer.bos_token_id) == adds
    assert (
        tokenizer.decode(tokenizer("the  lazy\n dog \u4f60").input_ids, skip_special_tokens=True)
        == "the  lazy\n dog \u4f60"
    )
