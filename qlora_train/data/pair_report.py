"""What a report says about preference pairs: lengths of both answers, and pairs that contradict each other."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import numpy as np

from qlora_train.data.reason_counts import MAX_LOCATIONS, locations_text
from qlora_train.data.selection import contradictory_pairs
from qlora_train.data.token_store import Rows

MIN_LENGTH_RATIO = 1.2
"""Median ratio of the lengths of two answers from which on a difference is worth a warning."""
MIN_DEVIATIONS = 4.0
"""Standard deviations of a fair coin by which the longer answers must be more on one side: with 16 pairs, all of them."""


@dataclass(frozen=True, slots=True)
class PairReport:
    """Preference pairs of a split.

    Attributes:
        num_pairs: in the files; one that is sampled twice counts once.
        num_prompts: different prompts.
        median_chosen: label tokens of the chosen answers.
        median_rejected: label tokens of the rejected answers.
        share_longer: share of pairs whose chosen answer has more label tokens.
        share_shorter: share of pairs whose chosen answer has fewer.
        median_ratio: of the label tokens of chosen and rejected answer.
        num_contradictory: pairs of which another one has the same answers in reverse.
        contradictory: the first locations of these.
    """

    num_pairs: int
    num_prompts: int
    median_chosen: float
    median_rejected: float
    share_longer: float
    share_shorter: float
    median_ratio: float
    num_contradictory: int
    contradictory: tuple[str, ...]

    @classmethod
    def of(cls, rows: Rows) -> Self:
        """Describe at least one pair."""
        pairs = Rows(rows.stores, np.unique(rows.indices))
        chosen, rejected = pairs.answer_lengths.T
        contradictory = np.flatnonzero(contradictory_pairs(pairs))
        return cls(
            num_pairs=len(pairs),
            num_prompts=len(np.unique(pairs.group_digests, axis=0)),
            median_chosen=float(np.median(chosen)),
            median_rejected=float(np.median(rejected)),
            share_longer=float(np.mean(chosen > rejected)),
            share_shorter=float(np.mean(chosen < rejected)),
            median_ratio=float(np.median(chosen / np.maximum(rejected, 1))),
            num_contradictory=len(contradictory),
            contradictory=tuple(pairs[int(index)].where for index in contradictory[:MAX_LOCATIONS]),
        )

    def line(self) -> str:
        return (
            f"pairs of {self.num_prompts:,} prompts; labels per answer: chosen median {self.median_chosen:g}, rejected "
            f"{self.median_rejected:g}"
        )

    def findings(self) -> Iterator[tuple[int, str]]:
        """Yield the number of pairs and the text of each thing to look at."""
        num_longer, num_shorter = (round(share * self.num_pairs) for share in (self.share_longer, self.share_shorter))
        deviations = (num_longer - num_shorter) / math.sqrt(max(num_longer + num_shorter, 1))
        ratio = max(self.median_ratio, 1 / max(self.median_ratio, 1e-9))
        is_longer = deviations > 0
        if abs(deviations) >= MIN_DEVIATIONS and ratio >= MIN_LENGTH_RATIO and is_longer == (self.median_ratio > 1):
            count, share = (num_longer, self.share_longer) if is_longer else (num_shorter, self.share_shorter)
            text = (
                f"the chosen answer is {'longer' if is_longer else 'shorter'} in {100 * share:.0f} % of pairs (median "
                f"length ratio {self.median_ratio:.2g}), so the model may learn length; train.objective: sigmoid_norm "
                "compares log-probabilities per token"
            )
            yield count, text
        if self.num_contradictory:
            where = locations_text(self.contradictory, self.num_contradictory)
            text = (
                f"{self.num_contradictory} pairs are contradicted by one with the same answers in reverse: {where}; remove "
                "one of each two"
            )
            yield self.num_contradictory, text
