"""Tokenising a text piece by piece, with the tokens of pieces remembered: most words of a text were met before.

The Rust tokenizer takes as long for a word that it has seen a thousand times as for a new one, and more than twice as
long for twice the text. Here it is asked for new pieces alone: most of a text costs a look-up a word, and the whole
grows with its length. `borders` says where texts may be cut, and for which tokenizers.

What stands before a piece decides whether a tokenizer puts a space before it, so that each is asked for in its context:
behind a word, behind a mark, or at the beginning of a text.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, lru_cache
from typing import Any

from qlora_train.data.borders import is_open, marks_of, pieces_of
from qlora_train.data.encodings import WholeText

WORD = "a"
"""Stands before a piece that follows another one."""
LONGEST_KEPT = 64
"""Characters of a piece that is kept; a longer one is seldom met again."""
MOST_KEPT = 100_000
"""Pieces that are kept before all are forgotten: some 25 MB."""
MOST_PLACES_KEPT = 8192
"""Places in such pieces whose tokens are kept."""

Encode = Callable[[str], WholeText]


class Context:
    """The tokens of pieces that stand behind a certain text.

    Args:
        encode: tokenises a text, whole and with nothing added.
        before: the text.
        num_tokens: that it has, whatever follows.
        keeps_open: whether pieces that are open are kept.
    """

    def __init__(self, encode: Encode, before: str, num_tokens: int, *, keeps_open: bool = True) -> None:
        self._encode, self._before, self._num_tokens, self._keeps_open = encode, before, num_tokens, keeps_open
        self._kept: dict[str, list[int]] = {}
        self._answers: dict[str, WholeText] = {}
        self._kept_places = lru_cache(MOST_PLACES_KEPT)(self._place)

    def next_text(self) -> None:
        """Forget what is only of use for one text."""
        self._answers.clear()

    def ids(self, piece: str) -> list[int]:
        """Return the tokens of one piece."""
        ids = self._kept.get(piece)
        if ids is None:
            ids = self._asked(piece).ids[self._num_tokens :]
            self._keep(piece, ids)
        return ids

    def kept(self, pieces: Sequence[str]) -> list[list[int]] | None:
        """Return the tokens of each piece; None if one is not known, as one that is open never is."""
        found = list(map(self._kept.get, pieces))
        return None if None in found else found  # type: ignore[return-value]

    def ids_of(self, pieces: Sequence[str]) -> list[list[int]]:
        """Return the tokens of each piece; of those that are new all but the open ones are asked for together."""
        new = list(dict.fromkeys(piece for piece in pieces if piece not in self._kept and not is_open(piece)))
        learnt = self._asked_together(new) if new else {}
        found = [learnt[piece] if piece in learnt else self.ids(piece) for piece in pieces]
        for piece, ids in learnt.items():
            self._keep(piece, ids)
        return found

    def first_token_after(self, piece: str, position: int) -> int:
        """Return which token of a piece is the first with a character at or after `position`."""
        return self._kept_places(piece, position) if len(piece) <= LONGEST_KEPT else self._place(piece, position)

    def chars_of(self, piece: str, token: int) -> tuple[int, int]:
        """Return the characters of a piece that its token stands for."""
        begin, end = self._asked(piece).chars_of(self._num_tokens + token)
        return begin - len(self._before), end - len(self._before)

    def _asked(self, piece: str) -> WholeText:
        if piece not in self._answers:
            self._answers[piece] = self._encode(self._before + piece)
        return self._answers[piece]

    def _asked_together(self, pieces: Sequence[str]) -> dict[str, list[int]]:
        tokens = self._encode(self._before + " ".join(pieces))
        learnt, begin, place = {}, self._num_tokens, len(self._before) - 1
        for piece in pieces:
            place += 1 + len(piece)
            end = bisect_right(tokens.ends, place)
            learnt[piece] = tokens.ids[begin:end]
            begin = end
        return learnt

    def _place(self, piece: str, position: int) -> int:
        return self._asked(piece).first_token_after(len(self._before) + position) - self._num_tokens

    def _keep(self, piece: str, ids: list[int]) -> None:
        if len(piece) <= LONGEST_KEPT and (self._keeps_open or not is_open(piece)):
            if len(self._kept) >= MOST_KEPT:
                self._kept.clear()
            self._kept[piece] = ids


class PieceEncoder:
    """Tokenises texts piece by piece.

    Args:
        encode: tokenises a text, whole and with nothing added.
        backend: the `tokenizers.Tokenizer` behind it, for which `borders.why_whole` has no reason.
    """

    def __init__(self, encode: Encode, backend: Any) -> None:
        self._marks = marks_of(backend)
        mark = next(mark.content for mark in backend.get_added_tokens_decoder().values() if not mark.rstrip)
        self._at_the_beginning = Context(encode, "", 0)
        self._behind_mark = Context(encode, mark, len(encode(mark).ids))
        self._behind_word = Context(encode, WORD + " ", len(encode(WORD).ids), keeps_open=False)

    def __call__(self, text: str) -> "PiecedText":
        """Return the tokens of a text."""
        for context in (self._at_the_beginning, self._behind_mark, self._behind_word):
            context.next_text()
        ids: list[int] = []
        begins = []
        segments = self._segments(text)
        for number, segment in enumerate(segments):
            begins.append(len(ids))
            if number % 2:
                ids += self._at_the_beginning.ids(segment)
            elif segment:
                first, others = self._ids_between_marks(segment)
                ids += self._context_of(number).ids(first)
                ids += itertools.chain.from_iterable(others)
        return PiecedText(self, ids, segments, begins)

    def _ids_between_marks(self, segment: str) -> tuple[str, list[list[int]]]:
        """Return the first piece of a segment, and the tokens of the others."""
        if " " not in segment:
            return segment, []
        first, *others = segment.split(" ")
        if not is_open(first):
            ids = self._behind_word.kept(others)
            if ids is not None:  # every space was a border, since no piece that is open is kept
                return first, ids
        first, *others = pieces_of(segment)
        return first, self._behind_word.ids_of(others)

    def pieces(self, segment: str, number: int) -> Iterator[tuple[Context, str, int]]:
        """Yield the pieces of a segment with their contexts, and where they begin in it."""
        if number % 2:
            yield self._at_the_beginning, segment, 0
            return
        context, begin = self._context_of(number), 0
        for piece in pieces_of(segment):
            yield context, piece, begin
            context, begin = self._behind_word, begin + len(piece) + 1

    def _segments(self, text: str) -> list[str]:
        """Return what stands between marks, and at odd indices the marks."""
        segments = [text]
        for marks in self._marks:
            segments = [
                part
                for number, segment in enumerate(segments)
                for part in ((segment,) if number % 2 else marks.split(segment))
            ]
        return segments

    def _context_of(self, number: int) -> Context:
        """Return what stands before the first piece of a segment between marks."""
        return self._behind_mark if number else self._at_the_beginning


class PiecedText:
    """The tokens of a text that was tokenised piece by piece.

    Args:
        encoder: did it.
        ids: the tokens.
        segments: the text, cut at its marks.
        begins: index of the first token of each segment.
    """

    def __init__(self, encoder: PieceEncoder, ids: list[int], segments: Sequence[str], begins: Sequence[int]) -> None:
        self.ids = ids
        self._encoder, self._segments, self._begins = encoder, segments, begins

    @cached_property
    def _char_begins(self) -> list[int]:
        return list(itertools.accumulate(map(len, self._segments), initial=0))

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; their number if there is none."""
        number = bisect_right(self._char_begins, position) - 1
        if number == len(self._segments):
            return len(self.ids)
        token, inside = self._begins[number], position - self._char_begins[number]
        if not inside:
            return token
        for context, piece, begin in self._encoder.pieces(self._segments[number], number):
            if inside < begin + len(piece):
                return token + context.first_token_after(piece, inside - begin)
            token += len(context.ids(piece))
        raise AssertionError("a segment ends before the next one begins")

    def chars_of(self, token: int) -> tuple[int, int]:
        """Return the characters [begin, end) that a token stands for."""
        number = bisect_right(self._begins, token) - 1
        place, inside = self._char_begins[number], token - self._begins[number]
        if number % 2:
            return place, self._char_begins[number + 1]
        for context, piece, begin in self._encoder.pieces(self._segments[number], number):
            num_tokens = len(context.ids(piece))
            if inside < num_tokens:
                first, last = context.chars_of(piece, inside)
                return place + begin + first, place + begin + last
            inside -= num_tokens
        raise AssertionError("a segment ends before the next one begins")
