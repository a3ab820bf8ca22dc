"""Parity check: loss and gradients computed in a new way match the reference, on the run's own rows, before step 1.

Fused kernels and padding-free training are used only if their check passes, on every rank. The result is stored in the run
folder, so that a resumed run computes as it began.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from qlora_train.adapters import AdaptedModel
from qlora_train.kernels.fsdp_units import is_sharded
from qlora_train.parallel import context
from qlora_train.runs import read_json
from qlora_train.training.parity.gradients import Gradients, Tolerances, compare_gradients, full_checkpointing
from qlora_train.utils import atomic_io
from qlora_train.utils.device import catch_out_of_memory
from qlora_train.utils.errors import CheckpointError, TrainingError, first_line, nondeterministic_operation

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
Sizes = Sequence[tuple[int, int]]
"""Rows and tokens per row, the largest first."""


@dataclass(frozen=True, slots=True)
class ParityResult:
    """Result of a parity check.

    Attributes:
        run_id: the run that it belongs to.
        passed: the run uses what was checked.
        problem: why the check failed.
        loss, gradient, tensor, worst: see `GradientDifference`; None if nothing could be compared.
        min_tokens: token budget of padding-free micro-batches; 0: that of the settings.
    """

    run_id: str
    passed: bool
    problem: str = ""
    loss: float | None = None
    gradient: float | None = None
    tensor: float | None = None
    worst: str = ""
    min_tokens: int = 0


def check_parity(
    name: str,
    adapted: AdaptedModel,
    run_id: str,
    sizes: Sizes,
    compute: Callable[[int, int], tuple[Gradients, Gradients]],
    tolerances: Tolerances,
) -> ParityResult:
    """Compare two ways of computing gradients, with every layer checkpointed; return the worst result of all ranks.

    Args:
        name: what is checked, for the log.
        sizes: batch sizes, tried until one fits into memory.
        compute: returns the expected and the actual gradients for a number of rows and of tokens per row.
        tolerances: the largest differences that pass.

    Raises:
        TrainingError: the smallest size does not fit into memory.
    """

    def check_on_this_rank() -> ParityResult:
        try:
            with full_checkpointing(adapted.loaded.model):
                difference = compare_gradients(*with_fitting_size(name, adapted, sizes, compute))
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            if nondeterministic_operation(error):  # says nothing about the model
                raise
            return ParityResult(run_id, False, f"it fails on this model ({first_line(error)})")
        passed = tolerances.allow(difference)
        problem = "" if passed else f"it differs on this model ({difference})"
        return ParityResult(run_id, passed, problem, **asdict(difference))

    results = context().gather(check_on_this_rank())
    return next((result for result in results if not result.passed), results[0])


def with_fitting_size(name: str, adapted: AdaptedModel, sizes: Sizes, compute: Callable[[int, int], Result]) -> Result:
    """Return `compute(num_rows, num_tokens)` for the first size that fits into the memory of every rank.

    Raises:
        TrainingError: the smallest size does not fit; the first one, with a sharded base.
        RuntimeError: `compute` failed on another rank.
    """
    for num_rows, num_tokens in sizes:
        result, reason, error = _outcome(partial(compute, num_rows, num_tokens))
        if reason is not None and is_sharded(adapted.model):  # others may wait for this rank's part of a layer
            raise TrainingError(
                f"{name}: out of memory in the parity check on {num_rows} x {num_tokens} tokens ({reason}); lower "
                "train.per_device_train_batch_size, start more processes, or free memory (fsdp cannot retry)"
            )
        outcomes = context().gather((reason, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        if failed := next((text for _, text in outcomes if text is not None), None):
            raise RuntimeError(failed)
        reason = next((text for text, _ in outcomes if text is not None), None)
        if reason is None:
            return result  # type: ignore[return-value]
        logger.warning("%s: parity check on %d x %d tokens: out of memory", name, num_rows, num_tokens)
    raise TrainingError(
        f"{name}: out of memory in the parity check on {num_rows} x {num_tokens} tokens ({reason}); free memory that "
        "others use, lower lora.r, or use a smaller model"
    )


def _outcome(compute: Callable[[], Result]) -> tuple[Result | None, str | None, Exception | None]:
    """Return the result, the message of an out-of-memory error, and any other error, of which the ranks must know."""
    try:
        return (*catch_out_of_memory(compute), None)
    except Exception as error:
        return None, None, error


def save_parity(file: Path, parity: ParityResult) -> None:
    if not context().is_main:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic_io.write_text(file, json.dumps(asdict(parity), indent=2) + "\n")


def load_parity(file: Path, run_id: str) -> ParityResult | None:
    """Return a stored result as rank 0 reads it; None if the file is missing or another run's.

    Raises:
        CheckpointError: the file is malformed.
    """
    return context().broadcast(_read_parity(file, run_id) if context().is_main else None)


def _read_parity(file: Path, run_id: str) -> ParityResult | None:
    try:
        content = read_json(file)
        parity = ParityResult(**content) if content else None
    except TypeError:
        raise CheckpointError(f"{file}: is not as it was written; restore it, or delete it") from None
    return parity if parity is not None and parity.run_id == run_id else None
