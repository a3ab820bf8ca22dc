"""How long it takes to check a merged model, and the rows on which this time stays bounded.

Weights that do not fit on the GPU move over PCIe in every forward pass: about 70 of 140 GB at 70B on an 80 GB card. The
rates are assumptions on the safe side.
"""

import logging
from pathlib import Path

import numpy as np

from qlora_train.export.merging.merged_model import PCIE_BYTES_PER_SECOND, streamed_bytes, weights_bytes
from qlora_train.export.predictions import Reference

logger = logging.getLogger(__name__)

CPU_FLOPS = 0.5e12
"""In bfloat16."""
MAX_CHECK_SECONDS = 900.0
MIN_LABEL_TOKENS = 2048
"""With fewer, chance moves the difference of two losses by as much as `export.max_loss_increase` allows."""
LOGGED_SECONDS = 60.0
"""Estimates below are not logged."""


def bounded_reference(reference: Reference, folder: Path, device: str) -> Reference:
    """Return the reference on the first rows that are checked in MAX_CHECK_SECONDS, with MIN_LABEL_TOKENS; log it.

    Args:
        reference: of all rows.
        folder: the merged model.
        device: on which it is checked.
    """
    moved_bytes, num_tokens = streamed_bytes(folder, device), np.array([len(row.input_ids) for row in reference.rows])
    per_pass = moved_bytes / PCIE_BYTES_PER_SECOND
    # 2 FLOP per token and parameter, which has 2 bytes
    per_token = weights_bytes(folder) / CPU_FLOPS if device == "cpu" else 0.0
    total = np.cumsum(2 * (per_pass + per_token * num_tokens))  # each row twice: for its loss and for its predictions
    labels = np.cumsum([row.num_tokens for row in reference.losses.per_example])
    least = int(np.searchsorted(labels, MIN_LABEL_TOKENS)) + 1
    num_rows = max(least, int(np.searchsorted(total, MAX_CHECK_SECONDS, side="right")))
    bounded = reference if num_rows >= len(reference.rows) else reference.first(num_rows)
    estimate = float(total[len(bounded.rows) - 1])
    if estimate >= LOGGED_SECONDS:
        where = "on the CPU" if device == "cpu" else (
            f"{moved_bytes / 1e9:.1f} GB of weights cross PCIe per pass; --device cpu keeps them in host memory"
        )  # fmt: skip
        logger.info("merge: checks %d of %d rows, at most about %.0f min (%s)",
                    len(bounded.rows), len(reference.rows), estimate / 60, where)  # fmt: skip
    return bounded
