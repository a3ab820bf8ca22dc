"""Watches the loss for spikes: a broken row or too high a learning rate shows there first.

A step's loss, in nats per label token, is compared with those of the last WINDOW_STEPS steps that were taken, by statistics
that a few outliers do not move (Rousseeuw and Croux 1993, https://doi.org/10.1080/01621459.1993.10476408)::

    limit = median + max(SPREADS * 1.4826 * MAD, FLOOR_NATS)

MAD is the median distance from the median; 1.4826 of it is the standard deviation of a normal distribution. The floor keeps
a course that is almost level from making a spike of nothing. Nothing is a spike before MIN_STEPS losses are known. A spike
is a loss of which it is not true that it is at most the limit, so that NaN is one.
"""

import statistics
from dataclasses import dataclass
from typing import Any

WINDOW_STEPS = 64
"""Steps whose losses are remembered; after a warning this many are quiet."""
MIN_STEPS = 16
SPREADS = 8.0
FLOOR_NATS = 0.5
_NORMAL = 1.4826


@dataclass(frozen=True)
class Spike:
    """A loss beyond the limit that the losses before it set; all in nats per label token."""

    loss: float
    median: float
    limit: float


class LossSpikeDetector:
    """The losses of the last steps that were taken; it belongs to the checkpoint."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def spike(self, loss: float) -> Spike | None:
        """Say whether a loss is one, compared with those before it."""
        if len(self._losses) < MIN_STEPS:
            return None
        median = statistics.median(self._losses)
        spread = _NORMAL * statistics.median(abs(other - median) for other in self._losses)
        limit = median + max(SPREADS * spread, FLOOR_NATS)
        return Spike(loss, median, limit) if not loss <= limit else None

    def add(self, loss: float) -> None:
        """Take the loss of a step."""
        self._losses = [*self._losses, loss][-WINDOW_STEPS:]

    def state(self) -> list[float]:
        """Return what a checkpoint holds of it."""
        return self._losses

    def restore(self, state: list[Any]) -> None:
        """Take what a checkpoint held."""
        self._losses = [float(loss) for loss in state]
