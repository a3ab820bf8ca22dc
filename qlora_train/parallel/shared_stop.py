"""Stops that all ranks make at the same step, whichever of them was asked."""

from qlora_train.parallel.context import context
from qlora_train.utils import signals


def shared_stop() -> bool:
    """Return whether any rank was asked to stop, and request the same stop on this one.

    A stop that is requested after this rank took part is that of the next call.
    """
    stop, this = signals.requested(), context()
    if this.world_size == 1:
        return stop is not None
    import torch

    if not int(this.sum_(torch.tensor([int(stop is not None)]))):
        return False
    causes = this.gather(None if stop is None else (stop.cause, stop.status))
    cause, status = next(filter(None, causes))
    signals.request(cause, status)
    return True
