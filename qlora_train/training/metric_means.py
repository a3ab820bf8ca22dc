"""Means of metrics over what was trained since the last log line; part of every checkpoint."""

import torch

from qlora_train.parallel import context


class MetricMeans:
    """Adds up metrics of this rank's micro-batches on their device, and reads them once per optimizer step."""

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

    def drop_step(self) -> None:
        """Forget the metrics of an optimizer step that is skipped."""
        self._pending = []

    def take(self) -> dict[str, float]:
        """Return the means over all ranks, and begin anew."""
        means = {name: total / count for name, (total, count) in self._total().items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, list[float]]:
        """Return the state of all ranks for a checkpoint."""
        return {name: [total, count] for name, (total, count) in self._total().items()}

    def restore(self, state: dict[str, list[float]]) -> None:
        """Restore the state of a checkpoint, on rank 0: it is that of all."""
        sums = {name: (total, int(count)) for name, (total, count) in state.items()}
        self._sums = sums if context().is_main else {}

    def _total(self) -> dict[str, tuple[float, int]]:
        sums: dict[str, tuple[float, int]] = {}
        for of_rank in context().gather(self._sums):
            for name, (total, count) in of_rank.items():
                before, num_items = sums.get(name, (0.0, 0))
                sums[name] = before + total, num_items + count
        return sums
