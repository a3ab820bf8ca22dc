"""Errors that the user can fix: printed as one line per problem, with exit status 2.

A message says what is wrong, where (``file:line: key``), what was found, what is allowed and what to do next. Bugs raise
other exceptions and show their traceback.
"""

import errno
import re
from collections.abc import Iterable, Mapping, Sequence


class UserError(Exception):
    """One or more problems that the user can fix, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        assert self.problems, "a UserError needs at least one problem"
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        """Pickle with all problems, for worker processes."""
        return type(self), (self.problems,)


class ConfigError(UserError):
    """The YAML file, an override or a combination of settings."""


class ModelError(UserError):
    """A base model or tokenizer that cannot be found, read or used."""


class DataError(UserError):
    """A data file or row that cannot be used, or too many of them."""


class CheckpointError(UserError):
    """A run folder or checkpoint that is damaged, from another run, or in use."""


class TrainingError(UserError):
    """A run that had to stop: non-finite loss, out of memory, full disk."""


class MergeError(UserError):
    """A merge that is not exact, or whose result is worse than the adapter."""


class ExportError(UserError):
    """An export that cannot be written, or that would differ from the trained model."""


class ProcessGroupError(UserError):
    """Another process of the run has ended, or cannot be reached."""


MAX_CONTAINING = 3
"""More names than this that contain the word are not suggested."""


def nearest_names(word: str, names: Iterable[str]) -> list[str]:
    """Return the names that `word` may be a misspelling of.

    These are the nearest names that differ in one character, in long words with the same first letter in up to 3; if there
    are none, names that contain the word.
    """
    known, lowered = list(names), word.lower()
    most = max(1, min(3, len(word) // 5))
    wrong = {name: num_edits(lowered, name.lower()) for name in known if abs(len(name) - len(word)) <= most}
    least = min(wrong.values(), default=len(word))
    close = [name for name, count in wrong.items() if count == least and (count < 2 or name[0].lower() == lowered[0])]
    if close and least < len(word) and least <= most:
        return close
    containing = [name for name in known if len(word) > 3 and lowered in name.lower()]
    return containing if len(containing) <= MAX_CONTAINING else []


def num_edits(word: str, name: str) -> int:
    """Return the edits that make `name` of `word`: characters inserted, deleted, replaced, or neighbours swapped.

    This is the optimal string alignment distance (Damerau 1964, Levenshtein 1966).
    """
    before: list[int] = []
    last = list(range(len(name) + 1))
    for row, char in enumerate(word, start=1):
        this = [row]
        for column, other in enumerate(name, start=1):
            edits = min(last[column] + 1, this[-1] + 1, last[column - 1] + (char != other))
            if row > 1 and column > 1 and char == name[column - 2] and word[row - 2] == other:
                edits = min(edits, before[column - 2] + 1)
            this.append(edits)
        before, last = last, this
    return last[-1]


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return `; did you mean a or b?`, or nothing if no name is near.

    Args:
        word: the unknown word.
        names: valid words, or a mapping of them to what the message shows.
    """
    shown = names if isinstance(names, Mapping) else {}
    found = [str(shown.get(name, name)) for name in nearest_names(word, names)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def listed(names: Sequence[str], limit: int = 8) -> str:
    """Join names for a message, at most `limit` of them."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, to quote it."""
    return str(error).strip().split("\n", 1)[0]


_FILE_SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
)  # fmt: skip
_DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""Messages of out-of-memory errors that are plain RuntimeErrors."""
CUBLAS_CONFIG = "CUBLAS_WORKSPACE_CONFIG"
"""Read by torch once per process, at its first matrix product on a GPU."""


def nondeterministic_operation(error: BaseException) -> str | None:
    """Return the operation that torch refused because of `use_deterministic_algorithms`, or None."""
    if not isinstance(error, RuntimeError):
        return None
    if CUBLAS_CONFIG in str(error):
        return "cuBLAS"
    found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether GPU or host memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def explain(error: BaseException) -> str | None:
    """Return the message for an error of a library or the system that the user can fix; None for a bug."""
    if isinstance(error, OSError) and error.errno in _FILE_SYSTEM_ERRORS:
        where = error.filename or "writing"
        return f"{where}: {error.strerror}; complete files are intact; free space or fix permissions, then repeat"
    for full in _DISK_FULL:  # safetensors has an error class of its own
        if full in str(error):
            return f"writing: {full}; complete files are intact; free space, then repeat"
    if "CUDA driver error: operation not supported" in str(error):  # as on some virtual GPUs
        return f"GPU: {first_line(error)}; repeat with PYTORCH_ALLOC_CONF=expandable_segments:False in the environment"
    if "busy or unavailable" in str(error):
        return (
            f"GPU: {first_line(error)}; another process uses it, or its compute mode is exclusive, which allows no second "
            "process to verify saved models: see nvidia-smi, use compute mode Default"
        )
    if CUBLAS_CONFIG in str(error):
        return (
            "run.deterministic: true, but this process already used the GPU without it; start a new process, or set "
            f"{CUBLAS_CONFIG}=:4096:8 before the first use"
        )
    if operation := nondeterministic_operation(error):
        return (
            f"run.deterministic: true, but {operation} has no deterministic algorithm on this device; set it to false: "
            "reruns are then equal within rounding"
        )
    if is_out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}; halve train.per_device_train_batch_size and double "
            "train.gradient_accumulation_steps, or lower data.max_length, then repeat"
        )
    return None
