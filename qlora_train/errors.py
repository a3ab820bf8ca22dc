"""The errors that people see: each is fixed by the user, printed as one line a problem, and ends with exit status 2.

A message says what is wrong, where (``file:line: key``), what was found, what is allowed and what to do next. A broken
invariant of our own is an ``assert`` or an ordinary exception instead, and shows its traceback.
"""

from collections.abc import Sequence


class UserError(Exception):
    """A problem, or several, that the user can fix.

    Args:
        problems: one line each; a plain string is one problem.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        assert self.problems, "a UserError needs at least one problem"
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """The YAML file, an override or a combination of settings."""


class ModelError(UserError):
    """A base model or tokenizer that cannot be had, read or used as asked."""


class DataError(UserError):
    """A data file, a row or the share of rows that cannot be used."""


class CheckpointError(UserError):
    """A run folder or checkpoint that is damaged, foreign or in use."""


class TrainingError(UserError):
    """A run that had to stop: non-finite numbers, out of memory, a full disk."""


class MergeError(UserError):
    """A merge that cannot be done exactly, or whose result is measurably worse than the adapter."""
