"""Reference log-probabilities of a run's rows on disk, with the fingerprint of what they were computed from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from qlora_train.utils import atomic_io

FILE = "logps.safetensors"
Logps = npt.NDArray[np.float32]
Shape = tuple[int, int]


@dataclass(frozen=True, slots=True)
class RunLogps:
    """Log-probabilities summed over labels, float32 (num_rows, num_sequences).

    Attributes:
        train: NaN for rows that the run does not train.
        eval: of held-out rows.
    """

    train: Logps
    eval: Logps

    @property
    def num_sequences(self) -> int:
        """Sequences that were computed."""
        return int(np.isfinite(self.train).sum()) + self.eval.size


class UnusableLogpsError(Exception):
    """Stored values cannot be used, with the reason."""


def write_logps(folder: Path, logps: RunLogps) -> None:
    """Write the arrays into an empty folder of `atomic_folder`."""
    arrays = {"train": np.ascontiguousarray(logps.train), "eval": np.ascontiguousarray(logps.eval)}
    atomic_io.write_file(folder / FILE, lambda path: save_file(arrays, path))


def save_logps(folder: Path, logps: RunLogps, fingerprint: Mapping[str, Any]) -> None:
    """Write or replace a folder of values atomically."""
    with atomic_io.atomic_folder(folder, fingerprint) as staging:
        write_logps(staging, logps)


def load_logps(
    folder: Path, *, needed: npt.NDArray[np.bool_], eval_shape: Shape, fingerprint: Mapping[str, Any] | None = None
) -> RunLogps:
    """Read stored values.

    Args:
        needed: training rows that must have values, (num_rows,).
        eval_shape: of the held-out values, (num_rows, num_sequences).
        fingerprint: that the folder must have; None: its name has been compared.

    Raises:
        UnusableLogpsError: damaged, of other rows, or computed from something else.
    """
    try:
        problem = atomic_io.verify_manifest(folder)
    except OSError as error:
        problem = f"{FILE} cannot be read ({error.strerror})"
    if problem is not None:
        raise UnusableLogpsError(problem)
    if fingerprint is not None:
        stored = atomic_io.read_metadata(folder)
        different = sorted(
            name for name in stored.keys() | fingerprint.keys() if stored.get(name) != fingerprint.get(name)
        )
        if different:
            raise UnusableLogpsError(f"computed with another {', '.join(different)}")
    try:
        arrays = load_file(folder / FILE)
        train, held_out = arrays["train"], arrays["eval"]
    except Exception as error:  # safetensors raises its own
        raise UnusableLogpsError(f"{FILE} cannot be read ({error})") from None
    shapes = (len(needed), eval_shape[1]), eval_shape
    if (train.shape, held_out.shape) != shapes or not train.dtype == held_out.dtype == np.float32:
        raise UnusableLogpsError(f"{FILE} is {train.shape} and {held_out.shape} {train.dtype}, not {shapes} float32")
    if not (np.isfinite(train[needed]).all() and np.isfinite(held_out).all()):
        raise UnusableLogpsError("some rows have no value")
    return RunLogps(train, held_out)
