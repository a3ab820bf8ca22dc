"""The rows of `data.train` or `data.eval` that are used in one epoch: their tokens, labels and lengths."""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from qlora_train.data.pair_report import PairReport


def length_quantiles(lengths: npt.NDArray[np.int32]) -> dict[str, int]:
    """Return min, median, p90, p99 and max of at least one length; each is a row's."""
    values = np.quantile(lengths, (0, 0.5, 0.9, 0.99, 1), method="inverted_cdf")
    return dict(zip(("min", "median", "p90", "p99", "max"), map(int, values), strict=True))


@dataclass(frozen=True, slots=True)
class SplitReport:
    """The rows of `data.train` or `data.eval` that are used in one epoch.

    Attributes:
        num_rows: rows, at least one.
        num_tokens: their tokens.
        num_labels: their label tokens.
        lengths: tokens per row, from `length_quantiles`.
        num_at_max_length: rows of exactly `data.max_length` tokens; pairs with such a sequence.
        num_duplicates: rows that equal an earlier one.
        num_deduplicated: rows that `data.deduplicate` removed.
        pairs: of preference pairs.
        num_desirable: of unpaired preferences; None: of other rows.
    """

    num_rows: int
    num_tokens: int
    num_labels: int
    lengths: dict[str, int]
    num_at_max_length: int
    num_duplicates: int = 0
    num_deduplicated: int = 0
    pairs: PairReport | None = None
    num_desirable: int | None = None

    @classmethod
    def of(
        cls,
        lengths: npt.NDArray[np.int32],
        num_labels: npt.NDArray[np.int32],
        *,
        pairs: PairReport | None = None,
        num_desirable: int | None = None,
        **counts: int,
    ) -> Self:
        """Count rows by their tokens and label tokens, each (num_rows,)."""
        return cls(
            num_rows=len(lengths),
            num_tokens=int(lengths.sum(dtype=np.int64)),
            num_labels=int(num_labels.sum(dtype=np.int64)),
            lengths=length_quantiles(lengths),
            pairs=pairs,
            num_desirable=num_desirable,
            **counts,
        )

    @property
    def label_share(self) -> float:
        return self.num_labels / self.num_tokens

    def lines(self, key: str, max_length: int) -> list[str]:
        quantiles = ", ".join(f"{name} {value}" for name, value in self.lengths.items())
        removed = f", {self.num_deduplicated} removed by data.deduplicate" if self.num_deduplicated else ""
        desirable = "" if self.num_desirable is None else f"{self.num_desirable:,} desirable, "
        counts = f"{desirable}{self.num_duplicates} duplicates{removed}"
        return [
            f"{key}: {self.num_rows:,} rows ({counts}), {self.num_tokens:,} tokens, "
            f"{self.num_labels:,} labels ({100 * self.label_share:.1f} %)",
            f"{key}: tokens per row: {quantiles}; {self.num_at_max_length} of data.max_length ({max_length})",
            *([] if self.pairs is None else [f"{key}: {self.pairs.line()}"]),
        ]
