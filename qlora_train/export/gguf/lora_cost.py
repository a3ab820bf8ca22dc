"""What an adapter gives on the GGUF file that a run was trained on: its loss in llama.cpp, beside the run's own.

The run trained on NF4 weights that were rounded from the dequantized file, llama.cpp computes with the file itself. The
difference of the two losses is what the second rounding costs.
"""

import logging
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from qlora_train.export.gguf.quant_cost import MUCH_WORSE, Cost, CostMeter
from qlora_train.runs import RunFolder

logger = logging.getLogger(__name__)


def measure_adapter(run: RunFolder, meter: CostMeter, base: Path, adapter: Path) -> dict[str, Any]:
    """Measure a GGUF file with and without an adapter, print the losses, and return an entry for results.json.

    Raises:
        ExportError: llama.cpp cannot load the files or compute with them.
    """
    num_rows = meter.num_rows
    cost = meter.measure(base, adapter=adapter)
    base_loss = meter.measure(base, loss_only=True).loss
    has_all_rows = cost.held_out and cost.num_rows == num_rows
    run_loss = run.read_results().get("training", {}).get("eval_loss") if has_all_rows else None
    _report(cost, base.name, base_loss, run_loss)
    return {
        "rows": "held-out" if cost.held_out else "training",
        "num_rows": cost.num_rows,
        "num_tokens": cost.num_tokens,
        "loss": cost.loss,
        "base_loss": base_loss,
        "run_loss": run_loss,
        "loss_increase": None if run_loss is None else cost.loss - run_loss,
        "num_prompts": cost.num_prompts,
        "exact_match": cost.exact_match,
    }


def _report(cost: Cost, base: str, base_loss: float, run_loss: float | None) -> None:
    table = Table(title=f"{cost.num_rows} {'held-out' if cost.held_out else 'training'} rows, {cost.num_tokens} tokens")
    table.add_column("model")
    table.add_column("loss", justify="right")
    table.add_row("base file in llama.cpp", f"{base_loss:.4f}")
    table.add_row("base file and adapter in llama.cpp", f"{cost.loss:.4f}")
    if run_loss is not None:
        table.add_row("the run itself (base in NF4)", f"{run_loss:.4f}")
    Console().print(table)
    if run_loss is not None and not cost.loss - run_loss <= MUCH_WORSE:
        logger.warning(
            "%s: with the adapter its loss is %.2f nats/token above the run's (much worse: use --format gguf)",
            base, cost.loss - run_loss,
        )  # fmt: skip
