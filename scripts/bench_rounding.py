"""What rounding to 16 bits costs a merge: held-out loss of a finished run's adapter, and of its merges by rounding.

Rounding to nearest is the float32 merge, cast while it is loaded.

Example: ``python scripts/bench_rounding.py runs/demo``
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qlora_train.adapters import load_trained
from qlora_train.data.held_out_rows import load_rows
from qlora_train.evaluation.held_out_loss import held_out_loss
from qlora_train.export.finished_run import FinishedRun, open_finished_run
from qlora_train.export.merging.merge_files import MergeSettings, merge_adapter
from qlora_train.models import load_model


def main() -> None:
    """Print a line for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    run = open_finished_run(parser.parse_args().run)
    rows = load_rows(run.folder.rows).eval
    loaded = load_model(run.config.model, run.config.quantization, source=run.source)

    def report(name: str, model: Any) -> None:
        losses = held_out_loss(model, rows, batch_size=4, pad_token_id=loaded.tokenizer.pad_token_id)
        print(f"{name:36} {losses.loss:.4f}", flush=True)

    report("base, 4 bits", loaded.model)
    report("adapter", load_trained(loaded, run.folder.adapter))
    for merge_base in ("dequantized", "original"):
        with TemporaryDirectory(dir=run.folder.path) as scratch:
            exact, rounded = (
                merged(run, Path(scratch), merge_base, dtype) for dtype in (torch.float32, torch.bfloat16)
            )
            for name, folder, dtype in (
                ("float32", exact, torch.float32), ("nearest", exact, torch.bfloat16),
                ("stochastic", rounded, torch.bfloat16),
            ):  # fmt: skip
                model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
                report(f"merged onto {merge_base}, {name}", model)


def merged(run: FinishedRun, scratch: Path, merge_base: Any, dtype: torch.dtype) -> Path:
    """Return the folder of a merge in `dtype`."""
    output = scratch / str(dtype).removeprefix("torch.")
    settings = MergeSettings(
        run.source.folder, run.folder.adapter, run.config.quantization, dtype, load_dtype=torch.bfloat16
    )
    merge_adapter(settings, output, merge_base)
    return output


if __name__ == "__main__":
    main()
