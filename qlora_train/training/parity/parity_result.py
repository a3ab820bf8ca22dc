"""Result of a parity check, stored in the run folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_train.training.parity.gradients import GradientDifference, Tolerances
from qlora_train.utils import atomic_io
from qlora_train.utils.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ParityResult:
    """Result of a parity check of fused kernels or of padding-free training.

    Attributes:
        run_id: of the run that it belongs to.
        on: whether the run uses what was checked.
        problem: why not.
        loss, gradient, tensor, worst: those of `GradientDifference`; None if the check failed.
        min_tokens: token budget of padding-free micro-batches; 0: that of the settings.
    """

    run_id: str
    on: bool
    problem: str = ""
    loss: float | None = None
    gradient: float | None = None
    tensor: float | None = None
    worst: str = ""
    min_tokens: int = 0

    @classmethod
    def of(cls, run_id: str, found: GradientDifference, bounds: Tolerances) -> "ParityResult":
        """Compare a difference with its bounds."""
        problem = "" if bounds.hold(found) else found.said()
        return cls(run_id, not problem, problem, **asdict(found))


def save_parity(file: Path, parity: ParityResult) -> None:
    """Write a result."""
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.write_text(file, json.dumps(asdict(parity), indent=2) + "\n")


def load_parity(file: Path, content: Mapping[str, Any], run_id: str) -> ParityResult | None:
    """Return the stored result of a run; None if there is none, or if it is another run's.

    Args:
        file: where it is.
        content: of the file; empty if it is missing.
        run_id: of the run.

    Raises:
        CheckpointError: the file is malformed.
    """
    try:
        parity = ParityResult(**content) if content else None
    except TypeError:
        raise CheckpointError(f"{file}: is not as it was written; restore it, or delete it") from None
    return parity if parity is not None and parity.run_id == run_id else None
