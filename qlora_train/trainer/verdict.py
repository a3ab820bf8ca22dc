"""What a run found when it compared another way of computing with the one that needs no comparison, kept in its folder."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qlora_train import durable
from qlora_train.errors import CheckpointError
from qlora_train.trainer.gradients import Bounds, Difference


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a run computes in the other way, and why not; the numbers are those of `Difference`, None where it failed.

    `min_tokens` is the token budget that padding-free micro-batches may be raised to; 0: they hold those of the settings.
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
    def of(cls, run_id: str, found: Difference, bounds: Bounds) -> "Verdict":
        """Judge a difference by its bounds."""
        problem = "" if bounds.hold(found) else found.said()
        return cls(run_id, not problem, problem, **asdict(found))


def keep_verdict(file: Path, verdict: Verdict) -> None:
    """Write a verdict."""
    file.parent.mkdir(parents=True, exist_ok=True)
    durable.write_text(file, json.dumps(asdict(verdict), indent=2) + "\n")


def known_verdict(file: Path, content: Mapping[str, Any], run_id: str) -> Verdict | None:
    """Return the verdict that a run has kept; None where it has none, or another run has.

    Args:
        file: where it is.
        content: what was read there, empty where there was nothing.
        run_id: of the run.

    Raises:
        CheckpointError: it is not as it was written.
    """
    try:
        verdict = Verdict(**content) if content else None
    except TypeError:
        raise CheckpointError(f"{file}: is not as it was written; restore it, or delete it") from None
    return verdict if verdict is not None and verdict.run_id == run_id else None
