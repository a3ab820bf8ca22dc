"""Token probes: texts with the run's token ids, to compare a reloaded, converted or exported tokenizer with.

Probes are a fixed list of hard strings, special tokens within text, and rows of the run. They fit into a small JSON
file for another process."""

import datetime
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from jinja2.exceptions import TemplateError

from qlora_train.data.chat_template import render_chat
from qlora_train.data.types import Example, Message

HARD_STRINGS = (
    "7", "494", "1234567890", "3.14159", "1,000,000", "2024-05-31", "v1.2.3", "a1b22c333", "x494", " 494", "\n",
    "\n\n", "\n\n\n", "a\n\nb", "a\n \n b", "\r\n", "\t\tx", "x ", "x  ", " x", "  x", "   x", "a  b", "a    b", " ",
    "   ", " \n", "\n x", "[INST] Hi [/INST]", "[INST]", "x [INST] y", "<s>", "<s>x", "<s> x", "</s>", "<unk>",
    "<|x|>", "<s>[INST] x [/INST] y</s>", "Hello world", "hello,world!", "HELLO", "don't DON'T we'll I'd",
    "e.g. (a) [b] {c}", "...", "--- ***", "\u201cq\u201d \u2014", "caf\xe9", "cafe\u0301", "\ufb01", "\xbd\xb2",
    "\uff21\uff11", "\xa0x", "\u200bx", "\u2581x", "x\u2581y", "\u4f60\u597d\u4e16\u754c", "\u6771\u4eac2024\u5e74",
    "\u3053\u3093\u306b\u3061\u306f", "\uc548\ub155", "\u0645\u0631\u062d\u0628\u0627", "\u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u041f\u0440\u0438\u0432\u0435\u0442", "\U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea", "x\U0001f600y",
    "def f(x):\n    return x  # y\n", "if (a != b) { c += 1; }\n\n", '{"k": [1, 22, null]}',
    "https://a.b/c?d=1&e=%20", "snake_case camelCase CONST_1", "\\n \\\\", "`x` ``` y",
)  # fmt: skip
"""Strings for which pre-tokenizers, normalizers and prefix spaces differ."""
NUM_SPECIAL = 48
"""Probed special tokens: some tokenizers have a thousand reserved ones."""
NUM_ROWS = 16
MAX_ROW_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class TokenProbe:
    """A text and its token ids.

    Attributes:
        messages: conversation that the chat template renders as `text`; None for plain text.
        date: ISO date for dated chat templates.
    """

    text: str
    ids: tuple[int, ...]
    add_special_tokens: bool = False
    messages: tuple[Message, ...] | None = None
    date: str | None = None

    @classmethod
    def of(cls, tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> Self:
        return cls(text, encode(tokenizer, text, add_special_tokens=add_special_tokens), add_special_tokens)


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = False) -> tuple[int, ...]:
    """Return the token ids of a text, without the warning about long ones."""
    return tuple(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])


def run_probes(tokenizer: Any, rows: Iterable[Example], *, date: datetime.date) -> list[TokenProbe]:
    """Return the probes of a run, with its first `NUM_ROWS` rows.

    Args:
        date: of the run, for dated chat templates.
    """
    texts = hard_texts(tokenizer)
    probes = [TokenProbe.of(tokenizer, text, add_special_tokens=special) for special in (False, True) for text in texts]
    return probes + [_of_row(tokenizer, row, date) for row in islice(rows, NUM_ROWS)]


def hard_texts(tokenizer: Any) -> list[str]:
    """Return the hard strings, and a tokenizer's special tokens within text."""
    return [*HARD_STRINGS, *_among_special_tokens(tokenizer)]


def _among_special_tokens(tokenizer: Any) -> Iterator[str]:
    added = [str(token) for _, token in sorted(tokenizer.added_tokens_decoder.items())]
    half = NUM_SPECIAL // 2
    chosen = dict.fromkeys([*tokenizer.all_special_tokens, *added[:half], *added[-half:]])
    for token in islice(chosen, NUM_SPECIAL):
        yield from (token, f"{token}x", f"{token} x", f"{token}\n\nx 494", f"x {token} y", f"{token}{token}[INST]")


def _of_row(tokenizer: Any, row: Example, date: datetime.date) -> TokenProbe:
    """Return a row's text with its ids: rendered again if that gives the row's ids, otherwise decoded."""
    ids = tuple(row.input_ids.tolist())
    if row.prompt is not None and row.answer is not None and not isinstance(row.prompt, str):
        messages = (*row.prompt, Message(role="assistant", content=row.answer))
        try:
            text = render_chat(tokenizer, messages, date=date)
        except TemplateError:
            text = ""
        if encode(tokenizer, text) == ids:
            return TokenProbe(text, ids, messages=messages, date=date.isoformat())
    if isinstance(row.prompt, str) and row.answer is not None:
        return TokenProbe.of(tokenizer, row.prompt + row.answer)
    text = tokenizer.decode(ids[:MAX_ROW_TOKENS], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return TokenProbe.of(tokenizer, text)


def differences(tokenizer: Any, probes: Sequence[TokenProbe], *, limit: int = 3) -> list[str]:
    """Compare a tokenizer with probes; return the first `limit` differences, one line each."""
    found = (difference for probe in probes if (difference := _difference(tokenizer, probe)) is not None)
    return list(islice(found, limit))


def _difference(tokenizer: Any, probe: TokenProbe) -> str | None:
    if probe.messages is not None:
        date = datetime.date.fromisoformat(probe.date or "")
        try:
            text = render_chat(tokenizer, probe.messages, date=date)
        except TemplateError as error:
            return f"the chat template fails: {error}"
        if text != probe.text:
            at = max(0, _first_difference(text, probe.text) - 10)
            return f"the chat template writes {_shortened(text[at:])!r} instead of {_shortened(probe.text[at:])!r}"
    actual = encode(tokenizer, probe.text, add_special_tokens=probe.add_special_tokens)
    return difference_of(tokenizer, probe, actual)


def difference_of(tokenizer: Any, probe: TokenProbe, actual: Sequence[int]) -> str | None:
    """Compare token ids with a probe's; return the first difference as a line."""
    if tuple(actual) == probe.ids:
        return None
    at = _first_difference(actual, probe.ids)
    return (
        f"{_shortened(probe.text)!r}, token {at}: {_tokens(tokenizer, actual[at:])} instead of "
        f"{_tokens(tokenizer, probe.ids[at:])}"
    )


def _first_difference(first: Sequence[object], second: Sequence[object]) -> int:
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _tokens(tokenizer: Any, ids: Sequence[int], limit: int = 4) -> str:
    """Return token names with ids; ids unknown to the tokenizer have no name."""
    size = len(tokenizer)
    named = [f"{tokenizer.convert_ids_to_tokens(i)!r} ({i})" if i < size else f"({i})" for i in ids[:limit]]
    return " ".join(named) + (" ..." if len(ids) > limit else "") if named else "nothing"


def _shortened(text: str, limit: int = 40) -> str:
    return text if len(text) <= limit else text[:limit] + "..."


def save_probes(file: Path, probes: Sequence[TokenProbe]) -> None:
    """Write probes to a JSON file for another process."""
    file.write_text(json.dumps([asdict(probe) for probe in probes]), encoding="utf-8")


def load_probes(file: Path) -> list[TokenProbe]:
    """Return what `save_probes` wrote."""
    return [_from_json(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]


def _from_json(entry: dict[str, Any]) -> TokenProbe:
    messages = entry["messages"]
    tuples = {"ids": tuple(entry["ids"]), "messages": None if messages is None else tuple(messages)}
    return TokenProbe(**{**entry, **tuples})
