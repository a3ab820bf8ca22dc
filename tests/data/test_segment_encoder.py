"""A text that is tokenised piece by piece has the tokens of the whole, whatever it says and whatever was met before."""

import json
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from qlora_train.data import segment_encoder, text_encoder
from qlora_train.data.char_offsets import WholeText
from qlora_train.data.segment_borders import SPLITTING, why_whole
from qlora_train.data.segment_encoder import PieceEncoder
from qlora_train.data.text_encoder import Encoder
from tests.support.pico import CORPUS

SPECIAL = ("<s>", "</s>", "<|end|>")
TEXTS = (
    *CORPUS, "def f(x):\n    return x  # it's\n\n\n    y", "1234567 12 3", "l'\u00e9t\u00e9 na\u00efve \u4e2d\u6587 \u4e2d",
    "a  b   c    d", "x, y; z... (w)", "DON'T don't We'll", "one\u2581two \u2581 three",
)  # fmt: skip


def byte_level(pattern: str | None = None, *before: Any) -> Any:
    splits = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    return pre_tokenizers.Sequence([*before, *splits, last])


def metaspace(scheme: str, *, split: bool) -> Any:
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


def build(
    pre_tokenizer: Any,
    normalizer: Any = None,
    marks: tuple[Any, ...] = (),
    *,
    splits_to_train: bool = False,
    trims: bool = False,
    **model: Any,
) -> Any:
    """Train a tokenizer; with `splits_to_train` on words alone, as those without splits were trained."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, **model))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = metaspace("always", split=True) if splits_to_train else pre_tokenizer
    special = ["<unk>", *SPECIAL]
    alphabet = [] if "etaspace" in str(tokenizer.pre_tokenizer) else pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS, "\u2581", "  ", "   "], trainer)
    if splits_to_train:
        tokenizer = with_runs_of_spaces(tokenizer)
    tokenizer.pre_tokenizer = pre_tokenizer
    if trims:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer.add_tokens(list(marks))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_runs_of_spaces(tokenizer: Any) -> Any:
    """Return a tokenizer that also knows two and four spaces, as vocabularies without splits do."""
    content = json.loads(tokenizer.to_str())
    for run in ("\u2581", "\u2581\u2581"):
        content["model"]["vocab"][run * 2] = len(content["model"]["vocab"])
        content["model"]["merges"].insert(0, [run, run])
    return Tokenizer.from_str(json.dumps(content))


GEMMA = (pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "\u2581"))
LLAMA = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
PHI = tuple(AddedToken(text, special=True, rstrip=True, normalized=False) for text in ("<|user|>", "<|assistant|>"))
CUTTABLE: dict[str, Callable[[], Any]] = {
    **{f"pattern {i}": lambda it=it: build(byte_level(it)) for i, it in enumerate(sorted(SPLITTING))},  # type: ignore[misc]
    "GPT-2": lambda: build(byte_level(), trims=True),
    "digits": lambda: build(byte_level(None, pre_tokenizers.Digits(individual_digits=True))),
    "composed": lambda: build(byte_level(min(SPLITTING)), normalizers.NFC()),
    "prefix space": lambda: build(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "marks that take space": lambda: build(byte_level(), marks=PHI),
    "marks that are words": lambda: build(byte_level(), marks=("wor", "words", "two words", "\n\n")),
    "words begin with a space": lambda: build(metaspace("always", split=True)),
    "SentencePiece, every part": lambda: build(metaspace("always", split=False), splits_to_train=True),
    "SentencePiece, first part": lambda: build(metaspace("first", split=False), splits_to_train=True),
    "SentencePiece, no part": lambda: build(metaspace("never", split=False), splits_to_train=True),
    "SentencePiece, marks take space": lambda: build(metaspace("first", split=False), marks=PHI, splits_to_train=True),
    "Llama": lambda: build(None, LLAMA, splits_to_train=True),
    "Gemma": lambda: build(*GEMMA, splits_to_train=True, marks=(AddedToken("\n\n", normalized=False),)),
}
tokenizer_of = cache(lambda name: CUTTABLE[name]())


@cache
def by_pieces_of(name: str) -> PieceEncoder:
    """Return one encoder for all texts, as in a run; it has no other way to fall back on."""
    backend = tokenizer_of(name).backend_tokenizer
    return PieceEncoder(lambda text: WholeText(backend.encode(text, add_special_tokens=False)), backend)


PARTS = (
    *SPECIAL, "<|user|>", "<|assistant|>", "two words", "wor", "words", *"aZ9.,'\"(-_/\n\t\r", " ", " ", " ", " ", "  ",
    " \n", "\n ", "one", " two", "the quick", " brown fox", "word", "1234", "'s", " 'll", "it's", "D'", "\u00e9", "e\u0301",
    "\u0301", " \u0301", "\u4e2d", "\U0001f600", "\U0001f44d\U0001f3fd", "\u00a0", "\u200d", "\u2581", "\u3000",
    "\x1c", "\x85", "\u05d0", "\u01c5",
)  # fmt: skip
texts = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=30).map("".join)


@pytest.mark.parametrize("name", CUTTABLE)
@settings(max_examples=150, deadline=None)
@given(text=texts)
@example(text="one\u2581 two \u2581 three\u2581")
@example(text=" one<s> one<s>one  two\n three \n<|user|> \n four")
@example(text="two words words wor\n\n\nwo")
def test_tokens_and_their_places_are_those_of_the_whole(name: str, text: str) -> None:
    tokenizer = tokenizer_of(name)
    expected = tokenizer(text, add_special_tokens=False)
    tokens, whole = by_pieces_of(name)(text), WholeText(expected.encodings[0])
    assert tokens.ids == expected["input_ids"]
    for position in range(len(text)):
        assert tokens.first_token_after(position) == whole.first_token_after(position)
    for place, token in enumerate(tokens.ids):
        if token in tokenizer.all_special_ids and token != tokenizer.unk_token_id:
            assert tokens.chars_of(place) == whole.chars_of(place)


@pytest.mark.parametrize("name", CUTTABLE)
@settings(max_examples=30, deadline=None)
@given(text=texts)
def test_text_that_is_mostly_new_is_tokenised_in_one_with_the_same_places(name: str, text: str) -> None:
    backend = tokenizer_of(name).backend_tokenizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment_encoder, "FEW_KEPT", 0)
        tokens = PieceEncoder(lambda text: WholeText(backend.encode(text, add_special_tokens=False)), backend)(text)
    whole = WholeText(backend.encode(text, add_special_tokens=False))
    assert tokens.ids == whole.ids
    places = range(len(text))
    assert [tokens.first_token_after(i) for i in places] == [whole.first_token_after(i) for i in places]


@pytest.mark.parametrize("name", CUTTABLE)
def test_these_tokenizers_are_asked_for_new_pieces_alone(name: str) -> None:
    backend = tokenizer_of(name).backend_tokenizer
    asked: list[str] = []

    def encode(text: str) -> WholeText:
        asked.append(text)
        return WholeText(backend.encode(text, add_special_tokens=False))

    assert why_whole(backend) is None
    by_pieces = PieceEncoder(encode, backend)
    text = "<s>the quick brown fox</s>the lazy dog"
    by_pieces(text)
    asked.clear()
    tokens = by_pieces(f"{text}<|end|>" * 20 + "the quick cat")
    assert [" cat" in each and "fox" not in each for each in asked if "<|end|>" not in each[:7]] == [True]
    assert sum(map(len, asked)) < len(text)
    assert tokens.ids == backend.encode(f"{text}<|end|>" * 20 + "the quick cat", add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["GPT-2", "Llama"])
def test_what_is_forgotten_or_too_long_to_keep_has_the_same_tokens(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segment_encoder, "MOST_KEPT", 3)
    monkeypatch.setattr(segment_encoder, "LONGEST_KEPT", 5)
    by_pieces = Encoder(tokenizer_of(name))
    for text in ("the quick brown fox jumps over", "over the quickest quickest <s>quickest the\n the") * 3:
        assert by_pieces(text).ids == tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]


def crossing_tokenizer() -> Any:
    """Return one that was trained without splits: its vocabulary has spaces inside."""
    return build(metaspace("always", split=False))


UNCUT: dict[str, tuple[Callable[[], Any], str]] = {
    "spaces inside": (crossing_tokenizer, "vocabulary has spaces inside of words"),
    "no splits": (
        lambda: build(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
        "does not split texts, and spaces",
    ),
    "another split": (lambda: build(byte_level(r"\w+ \w+")), "splits texts by Split in a way that is not known"),
    "space before": (lambda: build(pre_tokenizers.Split(" ", "merged_with_previous")), "by Split in a way"),
    "lower case": (lambda: build(byte_level(), normalizers.Lowercase()), "normalizes texts by Lowercase"),
    "marks that take space": (
        lambda: build(byte_level(), marks=(AddedToken("<m>", lstrip=True),)), "takes the space before it",
    ),
    "marks in words": (lambda: build(byte_level(), marks=(AddedToken("m", single_word=True),)), "in whole words only"),
    "marks in normalized text": (
        lambda: build(byte_level(), normalizers.NFC(), marks=(AddedToken("caf\u00e9", normalized=True),)),
        "looked for in normalized text",
    ),
    "marks that are space": (
        lambda: build(byte_level(), marks=(*PHI, AddedToken("\n\n", normalized=False))), "and another one is space",
    ),
    "random merges": (lambda: build(byte_level(), dropout=0.1), "its merges are random"),
    "words": (
        lambda: PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")), bos_token="<s>",
            eos_token="</s>",
        ),
        "its model is WordLevel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNCUT)
def test_texts_of_other_tokenizers_are_tokenised_whole_and_the_reason_is_told(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, reason = UNCUT[name][0](), UNCUT[name][1]
    assert reason in str(why_whole(tokenizer.backend_tokenizer))
    with caplog.at_level(logging.INFO, logger="qlora_train"):
        if name != "random merges":
            whole = Encoder(tokenizer)
            text = "<s>one two, caf\u00e9  m <m>\n\n<|user|>\n\nthree"
            assert whole(text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert f"tokenised whole, which takes longer: {why_whole(tokenizer.backend_tokenizer)}" in caplog.text


def test_a_difference_is_told_and_ends_the_quick_way(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = crossing_tokenizer()
    monkeypatch.setattr(text_encoder, "why_whole", lambda backend: None)
    it = Encoder(tokenizer)
    assert "other tokens in pieces than as a whole; rows are tokenised whole" in caplog.text
    for text in CORPUS:
        assert it(text).ids == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_difference_that_comes_late_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_encoder, "why_whole", lambda backend: None)
    monkeypatch.setattr(text_encoder, "MOST_CHECKED", 0)
    it = Encoder(crossing_tokenizer())
    for _ in range(text_encoder.CHECKED_ONCE_IN - 1):
        it(CORPUS[0])
    with pytest.raises(AssertionError, match="in pieces than as a whole"):
        it(CORPUS[0])
