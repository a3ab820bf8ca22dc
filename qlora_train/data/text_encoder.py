"""Text -> tokens as the tokenizer gives them at inference, in the quickest of three ways that is known to be right.

- Piece by piece (`pieces`), for tokenizers whose texts can be cut (`borders`).
- By the Rust tokenizer, whole: Transformers' own call spends as much time around it as in it.
- By Transformers' own call, which is the definition.

A hostile text and all special tokens are compared at the start, then the first text of every kind; a difference is told
and ends the quicker way. What is cut is compared now and then for as long as it goes on: a difference there would be a
defect of ours, and stops the run.
"""

import logging
import random
from typing import Any

from qlora_train.data.char_offsets import TextTokens, WholeText
from qlora_train.data.segment_borders import why_whole
from qlora_train.data.segment_encoder import PieceEncoder

log = logging.getLogger("qlora_train")

MOST_CHECKED = 16
CHECKED_ONCE_IN = 1024
"""Texts of which one is compared whole."""
PROBE = "  One two,\n\nthree\t4 \u00e9 \U0001f600 "
HOSTILE = (
    *"aZ9.,'\"(-_/ \n\t\r", " ", " ", " a", "  ", " \n", "'s", "'ll ", "\u00e9", "e\u0301", "\u0301", "\u4e2d",
    "\U0001f600", "\u00a0", "\u200d", "\u2581", "\u3000", "\x1c", "\x85", "\u05d0", "\uac00", "\u01c5", "\u00b2",
)  # fmt: skip
NUM_HOSTILE = 3000


class Encoder:
    """Tokenises texts that have their special tokens already.

    Args:
        tokenizer: a fast Transformers tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._is_plain = True
        self._num_checked = self._num_encoded = 0
        reason = why_whole(self._backend)
        self._by_pieces = None if reason else PieceEncoder(self._whole, self._backend)
        if reason:
            log.info("tokenizer: texts are tokenised whole, which takes longer: %s", reason)
        self.check(PROBE + "".join(tokenizer.all_special_tokens))
        if self._by_pieces:
            self.check(_hostile(tokenizer.all_special_tokens))

    def __call__(self, text: str) -> TextTokens:
        """Return the tokens of `text`, without anything added."""
        if self._by_pieces is None:
            return self._whole(text)
        tokens = self._by_pieces(text)
        self._num_encoded += 1
        if self._num_encoded % CHECKED_ONCE_IN == 0:
            assert tokens.ids == self._whole(text).ids, "a text has other tokens in pieces than as a whole"
        return tokens

    def check(self, text: str) -> None:
        """Compare the tokens of `text` with those of the tokenizer's own call; from a difference on, take a slower way.

        The first few texts are compared: that costs as much as several rows.
        """
        self._num_checked += 1
        if self._num_checked > MOST_CHECKED:
            return
        expected = self._by_wrapper(text).ids
        if self._by_pieces and self._by_pieces(text).ids != expected:
            log.warning("tokenizer: a text has other tokens in pieces than as a whole; rows are tokenised whole")
            self._by_pieces = None
        if self._is_plain and self._whole(text).ids != expected:
            log.warning(
                "tokenizer: %s changes what its Rust tokenizer makes of a text; rows take its own slower way",
                type(self._tokenizer).__name__,
            )
            self._is_plain, self._by_pieces = False, None

    def _whole(self, text: str) -> WholeText:
        if not self._is_plain:
            return self._by_wrapper(text)
        if self._backend.truncation is not None or self._backend.padding is not None:
            self._by_wrapper("")  # another call left its settings in the tokenizer; this one takes them out
        return WholeText(self._backend.encode(text, add_special_tokens=False))

    def _by_wrapper(self, text: str) -> WholeText:
        # verbose=False: no warning about the tokenizer's own idea of a maximum; data.max_length decides
        return WholeText(self._tokenizer(text, add_special_tokens=False, verbose=False).encodings[0])


def _hostile(special: list[str]) -> str:
    """Return a text of what borders could be wrong about, in an order that is the same every time."""
    return "".join(random.Random(0).choices((*HOSTILE, *HOSTILE, *special), k=NUM_HOSTILE))
