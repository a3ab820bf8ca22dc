"""The processes of a run: one context that knows this process's rank, and talks to the other ranks."""

from qlora_train.parallel.context import Context, context

__all__ = ["Context", "context"]
