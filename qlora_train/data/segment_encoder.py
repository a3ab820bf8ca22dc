"""Tokenising a text piece by piece, with the tokens of pieces remembered: most words of a text were met before.

The Rust tokenizer takes as long for a word that it has seen a thousand times as for a new one, and more than twice as
long for twice the text. Here it is asked for new pieces alone: most of a text costs a look-up a word, and the whole
grows with its length. `borders` says where texts may be cut, and for which tokenizers.

What stands before a piece decides whether a tokenizer puts a space before it, so that each is asked for in its context:
behind a word, behind a mark, or at the beginning of a text.
"""

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence, Set
from functools import cached_property, lru_cache
from typing import Any

from qlora_train.data.char_offsets import WholeText
from qlora_train.data.segment_borders import BORDER, is_open, marks_of, pieces_of

WORD = "a"
"""Stands before a piece that follows another one."""
LONGEST_KEPT = 64
"""Characters of a piece that is kept; a longer one is seldom met again."""
MOST_KEPT = 100_000
"""Pieces that are kept before all are forgotten: some 25 MB."""
MOST_PLACES_KEPT = 8192
"""Places in such pieces whose tokens are kept."""

MOST_NEW = 0.25
"""Share of the pieces between two marks that may be new; beyond it, asking for all in one is quicker than learning them."""
FEW_KEPT = 10_000
"""Pieces below which everything new is learnt."""
LEARNT_ONCE_IN = 16
"""Of the texts beyond `MOST_NEW`, one of so many is learnt all the same: those to come may be like it."""

Encode = Callable[[str], WholeText]
Ids = tuple[int, ...]


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
        self._kept: dict[str, Ids] = {}
        self._answers: dict[str, WholeText] = {}
        self._kept_places = lru_cache(MOST_PLACES_KEPT)(self._place)
        self._num_strange = 0

    def next_text(self) -> None:
        """Forget what is only of use for one text."""
        self._answers.clear()

    def ids(self, piece: str) -> Ids:
        """Return the tokens of one piece."""
        ids = self._kept.get(piece)
        if ids is None:
            ids = tuple(self._asked(piece).ids[self._num_tokens :])
            self._keep(piece, ids)
        return ids

    def kept(self, pieces: Sequence[str]) -> list[Ids | None]:
        """Return the tokens of each piece that is known, as one that is open never is."""
        return list(map(self._kept.get, pieces))

    def are_too_new(self, found: Sequence[Ids | None]) -> bool:
        """Say whether so many of some pieces are new that asking for all in one is quicker than learning them."""
        if found.count(None) <= MOST_NEW * len(found) or len(self._kept) < FEW_KEPT:
            return False
        self._num_strange += 1
        return self._num_strange % LEARNT_ONCE_IN != 0

    def learnt(self, pieces: Sequence[str]) -> list[Ids]:
        """Return the tokens of each piece; of the new ones all but the open ones are asked for together."""
        new = dict.fromkeys(piece for piece in pieces if piece not in self._kept)
        known = self._asked_together([piece for piece in new if not is_open(piece)]) if new else {}
        found = [known[piece] if piece in known else self.ids(piece) for piece in pieces]
        for piece, ids in known.items():
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

    def _asked_together(self, pieces: Sequence[str]) -> dict[str, Ids]:
        tokens = self._encode(self._before + " ".join(pieces))
        ids = tuple(tokens.ids)
        found, begin, place = {}, self._num_tokens, len(self._before) - 1
        for piece in pieces:
            place += 1 + len(piece)
            end = bisect_right(tokens.ends, place)
            found[piece] = ids[begin:end]
            begin = end
        return found

    def _place(self, piece: str, position: int) -> int:
        return self._asked(piece).first_token_after(len(self._before) + position) - self._num_tokens

    def _keep(self, piece: str, ids: Ids) -> None:
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
        begins, uncut = [], set()
        segments = self._segments(text)
        for number, segment in enumerate(segments):
            begins.append(len(ids))
            if number % 2:
                ids += self._at_the_beginning.ids(segment)
                continue
            context = self._context_of(number)
            cut = self._cut(segment) if " " in segment else (segment, ())
            if cut is None:
                uncut.add(number)
                ids += context.ids(segment)
            elif segment:
                first, others = cut
                ids += context.ids(first)
                ids += itertools.chain.from_iterable(others)
        return PiecedText(self, ids, segments, begins, uncut)

    def _cut(self, segment: str) -> tuple[str, Sequence[Ids]] | None:
        """Return the first piece of what stands between marks, and the tokens of the others; None if it is all new."""
        first, *others = segment.split(" ")
        found = self._behind_word.kept(others)
        if None not in found and not is_open(first):  # every space was a border, since no piece that is open is kept
            return first, found  # type: ignore[return-value]
        if self._behind_word.are_too_new(found):
            return None
        first, *others = BORDER.split(segment)
        return first, self._behind_word.learnt(others)

    def pieces(self, segment: str, number: int, *, is_cut: bool) -> Iterator[tuple[Context, str, int]]:
        """Yield the pieces of a segment with their contexts, and where they begin in it."""
        context, begin = self._context_of(number), 0
        for piece in pieces_of(segment) if is_cut else (segment,):
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
        """Return what stands before the first piece of a segment; a mark needs nothing there."""
        return self._behind_mark if number and number % 2 == 0 else self._at_the_beginning


class PiecedText:
    """The tokens of a text that was tokenised piece by piece.

    Args:
        encoder: did it.
        ids: the tokens.
        segments: what stands between marks, and at odd indices the marks.
        begins: index of the first token of each segment.
        uncut: indices of the segments that were tokenised in one.
    """

    def __init__(
        self, encoder: PieceEncoder, ids: list[int], segments: Sequence[str], begins: Sequence[int], uncut: Set[int]
    ) -> None:
        self.ids = ids
        self._encoder, self._segments, self._begins, self._uncut = encoder, segments, begins, uncut

    @cached_property
    def _char_begins(self) -> list[int]:
        return list(itertools.accumulate(map(len, self._segments), initial=0))

    def first_token_after(self, position: int) -> int:
        """Return the index of the first token with a character at or after `position`; their number if there is none."""
        number = bisect_right(self._char_begins, position) - 1
        if number == len(self._segments):
            return len(self.ids)
        token, inside = self._begins[number], position - self._char_begins[number]
        if number % 2 or not inside:
            return token
        for context, piece, begin in self._pieces(number):
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
        for context, piece, begin in self._pieces(number):
            num_tokens = len(context.ids(piece))
            if inside < num_tokens:
                first, last = context.chars_of(piece, inside)
                return place + begin + first, place + begin + last
            inside -= num_tokens
        raise AssertionError("a segment ends before the next one begins")

    def _pieces(self, number: int) -> Iterator[tuple[Context, str, int]]:
        return self._encoder.pieces(self._segments[number], number, is_cut=number not in self._uncut)
