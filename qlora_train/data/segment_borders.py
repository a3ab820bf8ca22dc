"""Which tokenizers give the parts of a text the tokens that they have in the whole, and where such a text may be cut.

A text may be cut at *marks*, the tokens that were added to a tokenizer: it takes them out before anything else and
tokenises what stands between them piece by piece. Between marks it may be cut where a space follows a character that is
no white space, if no token can reach over that border and none depends on what stands beyond it. That holds

- where the text is split before such a space before byte-pair merges begin. The patterns of `SPLITTING` do: in none of
  them can a space stand behind another character than white space, and what they look ahead for is white space.
- where the text is not split, but no entry of the vocabulary has a space behind a character that is no white space, so
  that no merge joins the two sides; merges on either side then do not concern the other.

A tokenizer of another kind is not cut, and `why_whole` says why. All of this is about the Rust tokenizer; what
Transformers may do around it is for `encoder` to find out.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

SPACE = "\u2581"
"""What stands for a space in vocabularies in the manner of SentencePiece; in a text it counts as white space here."""
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = (rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+", rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*")
SPLITTING = frozenset(
    (
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, and Qwen 2 with its digits one by one
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + REST,
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + REST,
        # Qwen 3.5
        CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + REST,
        # GPT-4o, and Mistral's Tekken
        "|".join(each + CONTRACTIONS + "?" for each in CASED) + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + REST,
        "|".join(CASED) + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + REST,
    )
)
"""Patterns that split a text into words, as `tokenizer.json` has them."""
WHITE_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""What the Rust tokenizer strips behind a mark; Python's own idea of white space holds more."""

BORDER = re.compile(rf" (?<=[^\s{SPACE}] )")
"""A space behind a character that is no white space."""


def pieces_of(text: str) -> Iterator[str]:
    """Yield the pieces of a text that holds no mark; all but the first lack the space that they begin with."""
    begin = 0
    for border in BORDER.finditer(text):
        yield text[begin : border.start()]
        begin = border.end()
    yield text[begin:]


def is_open(piece: str) -> bool:
    """Say whether a piece ends so that a space behind it would be no border."""
    return not piece or piece[-1].isspace() or piece[-1] == SPACE


def why_whole(backend: Any) -> str | None:
    """Return why texts must be tokenised whole; None if they may be cut.

    Args:
        backend: a `tokenizers.Tokenizer`.
    """
    normalizers = _components(backend.normalizer, "normalizers")
    return (
        _about_marks(list(backend.get_added_tokens_decoder().values()), is_normalized=bool(normalizers))
        or _about_normalizers(normalizers)
        or _about_model(backend)
        or _about_splits(backend, normalizers)
    )


def marks_of(backend: Any) -> list[re.Pattern[str]]:
    """Return patterns of a tokenizer's marks in the order in which they are looked for, each with one group: itself."""
    marks = [mark for mark in backend.get_added_tokens_decoder().values() if mark.content]
    kinds = ([mark for mark in marks if mark.normalized is normalized] for normalized in (False, True))
    return [_any_of(kind) for kind in kinds if kind]


def _any_of(marks: Iterable[Any]) -> re.Pattern[str]:
    longest_first = sorted(marks, key=lambda mark: -len(mark.content))
    return re.compile(f"({'|'.join(re.escape(m.content) + f'{WHITE_SPACE}*' * m.rstrip for m in longest_first)})")


def _components(component: Any, name: str) -> list[dict[str, Any]]:
    """Return what a normalizer or pre-tokenizer is made of, as `tokenizer.json` has it."""
    if component is None:
        return []
    state = json.loads(component.__getstate__())
    return list(state[name]) if state["type"] == "Sequence" else [state]


def _about_marks(marks: list[Any], *, is_normalized: bool) -> str | None:
    if all(mark.rstrip for mark in marks):
        return "it has no special token that keeps the space behind it"
    if any(mark.lstrip or mark.single_word for mark in marks):
        return "an added token takes the space before it, or is looked for in whole words only"
    if any(mark.rstrip for mark in marks) and any(mark.content[:1].isspace() for mark in marks):
        return "an added token takes the space behind it, and another one is space"
    if is_normalized and any(mark.normalized for mark in marks):
        return "an added token is looked for in normalized text"
    return None


def _about_normalizers(normalizers: list[dict[str, Any]]) -> str | None:
    """Only those will do that leave a space and what is beside it alone."""
    for it in normalizers:
        known = it["type"] == "NFC" or _replaces_spaces(it) or (it["type"] == "Prepend" and it["prepend"] == SPACE)
        if not known:
            return f"it normalizes texts by {it['type']}"
    return None


def _replaces_spaces(normalizer: dict[str, Any]) -> bool:
    return (
        normalizer["type"] == "Replace" and normalizer["pattern"] == {"String": " "} and normalizer["content"] == SPACE
    )


def _about_model(backend: Any) -> str | None:
    model = backend.model
    if type(model).__name__ != "BPE":
        return f"its model is {type(model).__name__}"
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return "its merges are random, or mark the ends of words"
    if backend.encode_special_tokens:
        return "it is set to read special tokens as text"
    return None


def _about_splits(backend: Any, normalizers: list[dict[str, Any]]) -> str | None:
    splits = _components(backend.pre_tokenizer, "pretokenizers")
    has_no_spaces = any(map(_replaces_spaces, normalizers))
    for it in splits:
        if not _is_harmless(it, has_no_spaces=has_no_spaces):
            return f"it splits texts by {it['type']} in a way that is not known"
    if any(_is_splitting(it) for it in splits):
        return None
    if not has_no_spaces and not any(it["type"] == "Metaspace" for it in splits):
        return "it does not split texts, and spaces are not seen in its vocabulary"
    vocabulary = backend.get_vocab(with_added_tokens=False)
    reaches_over = re.compile(rf"[^\s{SPACE}]{SPACE}").search
    if SPACE not in vocabulary or any(map(reaches_over, vocabulary)):
        return "it does not split texts, and its vocabulary has spaces inside of words"
    return None


def _is_harmless(split: dict[str, Any], *, has_no_spaces: bool) -> bool:
    """Say whether a component splits both sides of a border as it would without the other."""
    kind = split["type"]
    if kind == "Split" and split["pattern"] == {"String": " "}:
        return has_no_spaces
    return (
        kind in ("ByteLevel", "Digits")
        or (kind == "Metaspace" and split["replacement"] == SPACE)
        or _is_splitting(split)
    )


def _is_splitting(split: dict[str, Any]) -> bool:
    """Say whether a component splits before every space behind a character that is no white space."""
    kind = split["type"]
    if kind == "Split":
        is_isolated = split["behavior"] == "Isolated" and not split["invert"]
        return is_isolated and split["pattern"].get("Regex") in SPLITTING
    return (kind == "ByteLevel" and split["use_regex"]) or (kind == "Metaspace" and split["split"])
