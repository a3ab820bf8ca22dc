"""The errors that people see: each is fixed by the user, printed as one line a problem, and ends with exit status 2.

A message says what is wrong, where (``file:line: key``), what was found, what is allowed and what to do next. A broken
invariant of our own is an ``assert`` or an ordinary exception instead, and shows its traceback.
"""

import difflib
import errno
import re
from collections.abc import Iterable, Mapping, Sequence


class UserError(Exception):
    """A problem, or several, that the user can fix.

    Args:
        problems: one line each; a plain string is one problem.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        assert self.problems, "a UserError needs at least one problem"
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[tuple[str, ...]]]:
        """Come out of a worker process as it went in."""
        return type(self), (self.problems,)


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


class ExportError(UserError):
    """A file for another program that cannot be written, or that would not be the model that was trained."""


MAX_CONTAINING = 3
"""Names that contain a word and are suggested for it; more of them are no suggestion."""


def nearest_names(word: str, names: Iterable[str]) -> list[str]:
    """Return the names that `word` may be a slip of, several where they are equally near.

    One other character is a slip, in long words up to 3 behind the same first letter. Where no name is so near, those that
    contain the word are returned, if they are few.
    """
    known, lowered = list(names), word.lower()
    wrong = {name: _num_wrong(lowered, name.lower()) for name in known}
    least = min(wrong.values(), default=len(word))
    close = [name for name, count in wrong.items() if count == least and (count < 2 or name[0].lower() == lowered[0])]
    if close and least < len(word) and least <= max(1, min(3, len(word) // 5)):
        return close
    containing = [name for name in known if len(word) > 3 and lowered in name.lower()]
    return containing if len(containing) <= MAX_CONTAINING else []


def _num_wrong(word: str, name: str) -> int:
    """Return how many characters of the longer one have no counterpart in the other."""
    blocks = difflib.SequenceMatcher(None, name, word, autojunk=False).get_matching_blocks()
    return max(len(word), len(name)) - sum(block.size for block in blocks)


def did_you_mean(word: str, names: Iterable[str]) -> str:
    """Return `; did you mean a or b?`, or nothing if no name is near.

    Args:
        word: the unknown word.
        names: valid words, or a mapping of them to what the message shows.
    """
    shown = names if isinstance(names, Mapping) else {}
    found = [str(shown.get(name, name)) for name in nearest_names(word, names)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says of an error, for a message of ours."""
    return str(error).strip().split("\n", 1)[0]


_FILE_SYSTEM_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG,
)  # fmt: skip
_DISK_FULL = ("No space left on device", "Disk quota exceeded", "File too large")


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory", "std::bad_alloc",
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
)  # fmt: skip
"""What libraries say where they have no class for it."""


CUBLAS_CONFIG = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that torch reads once in a process, at its first matrix product on a GPU, and names where it is missing."""


def nondeterministic_operation(error: BaseException) -> str | None:
    """Return the operation that torch refuses while deterministic algorithms are on; None for another error."""
    if not isinstance(error, RuntimeError):
        return None
    if CUBLAS_CONFIG in str(error):
        return "cuBLAS"
    found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
    return found[1] if found else None


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that memory, of a GPU or of the host, did not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def explain(error: BaseException) -> str | None:
    """Return the line for a failure that any stage can meet and the user can fix; None for a defect of ours."""
    if isinstance(error, OSError) and error.errno in _FILE_SYSTEM_ERRORS:
        where = error.filename or "writing"
        return (
            f"{where}: {error.strerror}; nothing that was whole is lost; make room or access, then repeat the command"
        )
    for full in _DISK_FULL:  # safetensors has an error class of its own
        if full in str(error):
            return f"writing: {full}; nothing that was whole is lost; make room, then repeat the command"
    if "CUDA driver error: operation not supported" in str(error):  # as on some virtual GPUs
        return f"GPU: {first_line(error)}; repeat with PYTORCH_ALLOC_CONF=expandable_segments:False in the environment"
    if "busy or unavailable" in str(error):
        return (
            f"GPU: {first_line(error)}; another process has it, or its compute mode is exclusive, which admits no second "
            "process to check saved models: see nvidia-smi, ask for the compute mode Default"
        )
    if CUBLAS_CONFIG in str(error):
        return (
            "run.deterministic: true, but this process used the GPU before without it; repeat in a new process, or set "
            f"{CUBLAS_CONFIG}=:4096:8 before its first use"
        )
    if operation := nondeterministic_operation(error):
        return (
            f"run.deterministic: true, but {operation} has no deterministic algorithm on this device; set it to false, and "
            "reruns agree within rounding"
        )
    if is_out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}; halve train.per_device_train_batch_size and double "
            "train.gradient_accumulation_steps, or lower data.max_length, then repeat"
        )
    return None
