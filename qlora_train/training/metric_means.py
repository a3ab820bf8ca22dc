"""Means of metrics over what was trained since the last log line; part of every checkpoint."""

import torch


class MetricMeans:
    """Adds up metrics of micro-batches on their device, and reads them once per optimizer step."""

    def __init__(self) -> None:
        self._pending: list[tuple[str, torch.Tensor, int]] = []
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, name: str, total: torch.Tensor, count: int) -> None:
        """Add a metric's sum over `count` items, a scalar."""
        self._pending.append((name, total.detach().float(), count))

    def end_step(self) -> None:
        """Read the metrics of an optimizer step from the device."""
        if not self._pending:
            return
        totals = torch.stack([total for _, total, _ in self._pending]).tolist()
        for (name, _, count), total in zip(self._pending, totals, strict=True):
            before, num_items = self._sums.get(name, (0.0, 0))
            self._sums[name] = before + total, num_items + count
        self._pending = []

    def take(self) -> dict[str, float]:
        """Return the means, and begin anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        return {name: [total, count] for name, (total, count) in self._sums.items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        self._sums = {name: (total, int(count)) for name, (total, count) in state.items()}
