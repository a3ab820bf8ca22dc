"""Bound the time of a merge's check.

Weights that do not fit on the GPU move over PCIe in every forward pass: about 70 of 140 GB at 70B on an 80 GB card. The
assumed rates are conservative.
"""

import logging
from pathlib import Path

import numpy as np

from qlora_train.export.merging.load_merged import PCIE_BYTES_PER_SECOND, streamed_bytes, weights_bytes
from qlora_train.export.predictions import Reference

logger = logging.getLogger(__name__)

CPU_FLOPS = 0.5e12
"""In bfloat16."""
MAX_CHECK_SECONDS = 900.0
MIN_LABEL_TOKENS = 2048
"""With fewer, the noise in the difference of two losses is as large as `export.max_loss_increase`."""
LOGGED_SECONDS = 60.0
"""Shorter estimates are not logged."""


def bounded_reference(
    reference: Reference,
    folder: Path,
    device: str,
    *,
    max_seconds: float = MAX_CHECK_SECONDS,
    min_label_tokens: int = MIN_LABEL_TOKENS,
) -> Reference:
    """Return the reference on the first rows that the check of a merged folder covers in `max_seconds`, and log it.

    At least `min_label_tokens` are checked.
    """
    moved_bytes, num_tokens = streamed_bytes(folder, device), np.array([len(row.input_ids) for row in reference.rows])
    per_pass = moved_bytes / PCIE_BYTES_PER_SECOND
    # 2 FLOP per token and parameter, which has 2 bytes
    per_token = weights_bytes(folder) / CPU_FLOPS if device == "cpu" else 0.0
    total = np.cumsum(2 * (per_pass + per_token * num_tokens))  # each row twice: loss and predictions
    labels = np.cumsum([row.num_tokens for row in reference.losses.per_example])
    min_rows = int(np.searchsorted(labels, min_label_tokens)) + 1
    num_rows = max(min_rows, int(np.searchsorted(total, max_seconds, side="right")))
    bounded = reference if num_rows >= len(reference.rows) else reference.first(num_rows)
    estimate = float(total[len(bounded.rows) - 1])
    if estimate >= LOGGED_SECONDS:
        where = "on the CPU"
        if device != "cpu":
            where = f"{moved_bytes / 1e9:.1f} GB of weights cross PCIe per pass; --device cpu keeps them in host memory"
        logger.debug(
            "merge: checks %d of %d rows, at most about %.0f min (%s)",
            len(bounded.rows), len(reference.rows), estimate / 60, where,
        )  # fmt: skip
    return bounded
