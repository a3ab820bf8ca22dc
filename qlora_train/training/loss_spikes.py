"""Loss spikes: the first sign of a broken row or too high a learning rate.

The loss of a step, in nats per label token, is compared with robust statistics (Rousseeuw and Croux 1993,
https://doi.org/10.1080/01621459.1993.10476408) of the last WINDOW_STEPS steps::

    limit = median + max(NUM_DEVIATIONS * 1.4826 * MAD, MIN_EXCESS_NATS)

MAD is the median absolute deviation; 1.4826 * MAD estimates the standard deviation of a normal distribution. The minimum
excess avoids false spikes on an almost constant loss.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WINDOW_STEPS = 64
"""Steps whose losses are stored; also the steps without a second warning."""
MIN_STEPS = 16
"""Steps before the first spike."""
NUM_DEVIATIONS = 8.0
MIN_EXCESS_NATS = 0.5
MAD_TO_STANDARD_DEVIATION = 1.4826


@dataclass(frozen=True)
class Spike:
    """A loss above the limit, in nats per label token."""

    loss: float
    median: float
    limit: float


class LossSpikeDetector:
    """The losses of the last steps; part of every checkpoint."""

    def __init__(self) -> None:
        self._losses: list[float] = []

    def detect(self, loss: float) -> Spike | None:
        """Compare a loss with those before it; NaN is a spike."""
        if len(self._losses) < MIN_STEPS:
            return None
        median = statistics.median(self._losses)
        mad = statistics.median(abs(other - median) for other in self._losses)
        limit = median + max(NUM_DEVIATIONS * (MAD_TO_STANDARD_DEVIATION * mad), MIN_EXCESS_NATS)
        return Spike(loss, median, limit) if not loss <= limit else None

    def add(self, loss: float) -> None:
        self._losses = [*self._losses, loss][-WINDOW_STEPS:]

    def state(self) -> list[float]:
        return self._losses

    def restore(self, state: Sequence[float]) -> None:
        self._losses = [float(loss) for loss in state]
