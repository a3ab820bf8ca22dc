"""What a number format costs: the loss of a GGUF file on the run's held-out rows, and its answers to held-out prompts.

llama.cpp computes both from the token ids of the run, so rows, labels and prompts are those of training. The first file is
limited in time; all others are measured on the rows and prompts that it got through.
"""

import datetime
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from qlora_train.data.held_out_rows import load_rows
from qlora_train.data.types import Example
from qlora_train.evaluation.generation import answer_end_ids, encode_prompts
from qlora_train.evaluation.scoring import score_answers
from qlora_train.export.gguf.gguf_check import GGUFFile
from qlora_train.export.gguf.llama_process import INSTALL, evaluate_file, has_library
from qlora_train.runs import RunFolder

logger = logging.getLogger(__name__)

MAX_PROMPTS = 64
MAX_NEW_TOKENS = 256
"""As in `qlora-train eval`."""
MUCH_WORSE = 0.1
"""Increase of the loss in nats per token (10 % of perplexity) above which a number format is warned of."""


@dataclass(frozen=True)
class Cost:
    """Measurements of a file.

    Attributes:
        held_out: False for training rows, where no rows are held out.
        loss: nats per label token.
        num_tokens: label tokens of the rows.
        exact_match: share of exact answers; None if no row has an answer.
    """

    held_out: bool
    num_rows: int
    num_tokens: int
    loss: float
    num_prompts: int
    exact_match: float | None


class CostMeter:
    """Measures files on the same rows and prompts.

    Args:
        rows: with their labels; the first that have an answer are also asked for it.
        max_seconds: for the rows and for the prompts of the first file each.
    """

    def __init__(
        self, rows: Sequence[Example], *, held_out: bool, tokenizer: Any, date: datetime.date, max_seconds: float
    ) -> None:
        self._held_out, self._tokenizer = held_out, tokenizer
        self._rows = [(row.input_ids.tolist(), row.loss_mask.tolist()) for row in rows]
        answered = [row for row in rows if row.answer is not None and row.prompt is not None][:MAX_PROMPTS]
        self._expected = [row.answer or "" for row in answered]
        self._prompts = encode_prompts(tokenizer, [row.prompt for row in answered if row.prompt is not None], date)
        self._stops = answer_end_ids(tokenizer)
        self._max_seconds: float | None = max_seconds

    @property
    def num_rows(self) -> int:
        """Number of rows that are measured."""
        return len(self._rows)

    def measure(self, file: Path, *, adapter: Path | None = None, loss_only: bool = False) -> Cost:
        """Compute the loss and the answers of a file, with an adapter if there is one, in llama.cpp.

        Raises:
            ExportError: llama.cpp cannot load it or compute with it.
        """
        prompts = [] if loss_only else self._prompts
        evaluation = evaluate_file(
            file, adapter=adapter, rows=self._rows, prompts=prompts, stops=self._stops, max_new_tokens=MAX_NEW_TOKENS,
            max_seconds=self._max_seconds,
        )  # fmt: skip
        self._keep(len(evaluation.nll), len(self._prompts) if loss_only else len(evaluation.answers))
        num_tokens = sum(sum(is_label[1:]) for _, is_label in self._rows)
        answers = [self._tokenizer.decode(ids, skip_special_tokens=True) for ids in evaluation.answers]
        return Cost(
            held_out=self._held_out, num_rows=len(self._rows), num_tokens=num_tokens,
            loss=math.fsum(evaluation.nll) / num_tokens, num_prompts=len(answers),
            exact_match=score_answers(self._expected, answers).exact_match if answers else None,
        )  # fmt: skip

    def _keep(self, num_rows: int, num_prompts: int) -> None:
        if num_rows < len(self._rows) or num_prompts < len(self._prompts):
            logger.info(
                "cost: measured on the first %d of %d rows and %d of %d prompts (--max-eval-minutes)",
                num_rows, len(self._rows), num_prompts, len(self._prompts),
            )  # fmt: skip
        self._rows, self._prompts = self._rows[:num_rows], self._prompts[:num_prompts]
        self._expected, self._max_seconds = self._expected[:num_prompts], None


def find_meter(run: RunFolder, tokenizer: Any, max_minutes: float) -> CostMeter | None:
    """Return a meter of the run's held-out rows, or of its first training rows if it holds out none.

    Returns:
        None if nothing is to be measured, or llama.cpp's library is missing, which is logged.
    """
    if max_minutes == 0:
        return None
    if not has_library():
        logger.warning("cost: not measured (not installed: %s)", INSTALL)
        return None
    data = load_rows(run.rows)
    rows: Sequence[Example] = data.eval or data.first_rows()
    rows = [row for row in rows if np.any(row.loss_mask[1:])]
    logger.info(
        "cost: measured in llama.cpp, at most %g minutes for rows and for answers (--max-eval-minutes)", max_minutes
    )
    return CostMeter(
        rows, held_out=bool(data.eval), tokenizer=tokenizer, date=run.start_date(), max_seconds=60 * max_minutes
    )


def result_entry(
    quant: str, file: GGUFFile, cost: Cost | None, reference: tuple[str, Cost | None] | None
) -> dict[str, Any]:
    """Return a file's entry of results.json; losses are in nats per token.

    Args:
        reference: number format and cost of the file that holds the weights exactly; None for this file.
    """
    entry: dict[str, Any] = {
        "quant": quant, "file": file.path.name, "size_bytes": file.path.stat().st_size, "tensor_types": file.count_types(),
    }  # fmt: skip
    if cost is None:
        return entry
    exact_quant, exact = reference if reference is not None else (quant, cost)
    assert exact is not None, "the exact file is measured first"
    return entry | {
        "rows": "held-out" if cost.held_out else "training",
        "num_rows": cost.num_rows,
        "num_tokens": cost.num_tokens,
        "loss": cost.loss,
        "loss_increase": cost.loss - exact.loss,
        "num_prompts": cost.num_prompts,
        "exact_match": cost.exact_match,
        "reference": {"quant": exact_quant, "loss": exact.loss, "exact_match": exact.exact_match},
    }


def report(entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of measured files, and warn of those that are much worse than the exact weights."""
    first = next(iter(entries.values()))
    reference = first["reference"]
    table = Table(title=f"{first['num_rows']} {first['rows']} rows, {first['num_prompts']} prompts")
    for title in ("quant", "size", "loss", f"above {reference['quant']}", "exact match"):
        table.add_column(title, justify="left" if title == "quant" else "right")
    if reference["quant"] not in entries:
        table.add_row(reference["quant"], "-", f"{reference['loss']:.4f}", "-", _percent(reference["exact_match"]))
    for quant, entry in entries.items():
        increase = "-" if quant == reference["quant"] else f"{entry['loss_increase']:+.4f}"
        table.add_row(
            quant,
            f"{entry['size_bytes'] / 1e6:,.0f} MB",
            f"{entry['loss']:.4f}",
            increase,
            _percent(entry["exact_match"]),
        )
        if not entry["loss_increase"] <= MUCH_WORSE:
            logger.warning(
                "%s: its loss is %.2f nats/token above that of %s (much worse: use a larger --quant)",
                entry["file"], entry["loss_increase"], reference["quant"],
            )  # fmt: skip
    Console().print(table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
