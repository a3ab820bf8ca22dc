"""What every peer of `scripts/bench.py` is measured with: steps, tokens and labels, memory, gradients, losses."""

import json
import resource
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback


class Timing(TrainerCallback):
    """Times optimizer steps from the end of one to the end of the next; the first of them only warms up.

    It also looks into every batch of the trainer's own loader: padding counts as no token.
    """

    def __init__(self) -> None:
        self.row_lengths: list[list[int]] = []
        self.labels: list[int] = []
        self.rows: list[list[int]] = []
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.norms: list[float] = []
        self._begun = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **keywords: Any) -> None:
        """Put the count between the loader and its collator."""
        loader = keywords["train_dataloader"]
        loader = vars(loader).get("base_dataloader", loader)  # what accelerate's own loader reads from
        loader.collate_fn = self._counted(loader.collate_fn)

    def _counted(self, collate: Any) -> Any:
        def collate_and_count(rows: Any) -> Any:
            made = collate(rows)
            batches = made if isinstance(made, list) else [made]  # ours makes all of a step
            self.row_lengths.append([length for batch in batches for length in row_lengths(batch)])
            self.labels.append(sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches))
            if "row" in batches[0]:
                self.rows.append([row for batch in batches for row in batch["row"].tolist()])
            return made

        return collate_and_count

    def on_step_end(self, args: Any, state: Any, control: Any, **_keywords: Any) -> None:
        """Note the time."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_keywords: Any) -> None:
        """Note loss and gradient norm."""
        logs = logs or {}
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))
            self.norms.append(float(logs.get("grad_norm", "nan")))

    def write(self, file: Path, **others: Any) -> None:
        """Write the measurements and a peer's extra fields."""
        seconds = [end - begin for begin, end in pairwise(self.ends)]
        timed = slice(1, len(self.ends))
        content = {
            "tokens": [sum(lengths) for lengths in self.row_lengths[timed]],
            "row_lengths": self.row_lengths[timed],
            "labels": self.labels[timed],
            "seconds": seconds,
            "first_step_seconds": self.ends[0] - self._begun,
            "losses": self.losses,
            "grad_norms": self.norms,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "peak_device_gb": torch.cuda.max_memory_reserved() / 1e9 if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            **others,
        }
        file.write_text(json.dumps(content))


def row_lengths(batch: Any) -> list[int]:
    """Return the tokens of each row of a batch, or of each document of a packed row, whose positions jump between them.

    What a document has from another one counts as its own; documents that only pad have no number in `row`.
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.ndim == 2 and int(mask.max()) == 1:
        lengths: list[int] = mask.sum(dim=1).tolist()
        return lengths
    positions = batch["position_ids"].flatten()
    ends = (positions[1:] != positions[:-1] + 1).nonzero().flatten().tolist()
    lengths = [int(positions[end]) + 1 for end in [*ends, -1]]
    return lengths[: len(batch["row"])] if "row" in batch else lengths


def settings_of(arguments: list[str]) -> tuple[dict[str, Any], Path]:
    """Return the settings and the file for the result from a peer's two arguments."""
    settings: dict[str, Any] = json.loads(Path(arguments[0]).read_text())
    return settings, Path(arguments[1])
