"""GPU memory of a step of preference training beside a step of SFT on the same sequences, counted on fake tensors.

Both train one micro-batch of two sequences in which every token is a label: the rows of SFT, and the pair of DPO, whose
reference pass is the base with the adapter off, or the adapter that training began with (`lora.adapter_path`). Nothing is
computed; `scripts/count_memory.py` lists what is counted.

Example: ``PYTHONPATH=. python scripts/count_preference_memory.py --output benchmarks/results/memory-preferences.json``
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from count_memory import DEVICE, MODELS, RANK, batch_of, fake_gpu, materialise, meta_model, trainer_of

from qlora_train.adapters.reference_model import InitialAdapter, base_model
from qlora_train.evaluation.objective_table import SFT
from qlora_train.kernels.install import install
from qlora_train.objectives.batch_loss import LossFunction
from qlora_train.objectives.label_losses import choose_chunk_tokens, label_losses
from qlora_train.objectives.preference_loss import PreferenceLoss
from qlora_train.objectives.sft_loss import SftLoss
from qlora_train.training.memory import memory_probe
from qlora_train.training.memory.activation_checkpointing import LayerCheckpointing

OBJECTIVES: dict[str, Callable[[Any], LossFunction]] = {
    "sft": lambda _model: SftLoss(),
    "dpo": lambda _model: PreferenceLoss("dpo", beta=0.1, reference=base_model),
    "dpo from an adapter": lambda model: PreferenceLoss("dpo", beta=0.1, reference=InitialAdapter(model)),
}
CHECKPOINTING = ("none", "full")


class LabelCounts(list[int]):
    """Labels of each sequence, which a fake tensor would forget."""

    def tolist(self) -> list[int]:
        """Return them, as a tensor does."""
        return list(self)

    def to(self, device: torch.device) -> torch.Tensor:
        """Return them as a tensor."""
        return torch.tensor(list(self), device=device)


def pair_of(num_tokens: int) -> dict[str, torch.Tensor]:
    """Return a pair of two sequences of as many tokens, which is also two rows of SFT."""
    return {**batch_of(2, num_tokens), "row": torch.zeros(2, dtype=torch.long), "sequence": torch.arange(2)}


def count_step(config_json: dict[str, Any], num_tokens: int, objective: str, checkpointing: str) -> int:
    """Return the peak bytes of a step, weights included."""
    model = meta_model(config_json)
    with fake_gpu() as live:
        materialise(model)
        loaded = SimpleNamespace(model=model.get_base_model(), compute_dtype=torch.bfloat16, device=DEVICE)
        trainer = trainer_of(SimpleNamespace(model=model, loaded=loaded), 1)
        loss = OBJECTIVES[objective](model)
        trainer.objective = replace(SFT, loss=loss)
        counts, chunk_tokens = LabelCounts([num_tokens] * 2), choose_chunk_tokens(model)
        trainer.batch_loss = lambda model, batch: loss(
            model, {**batch, "num_labels": counts}, chunk_tokens=chunk_tokens, with_aux_loss=False
        )
        fused = install(model, lambda: label_losses(model, **batch_of(1, 8)))
        LayerCheckpointing(model, fused.mlps).set(checkpointing)
        live.peak = live.live
        memory_probe._train(trainer, model, [pair_of(num_tokens)])
        return live.peak


def count_at_depths(config_json: dict[str, Any], num_tokens: int, objective: str, checkpointing: str) -> float:
    """Return the peak in GB, extended from 2 and 6 layers to those of the config."""
    low, high = (
        count_step({**config_json, "num_hidden_layers": layers}, num_tokens, objective, checkpointing)
        for layers in (2, 6)
    )
    return (low + (high - low) * (config_json["num_hidden_layers"] - 2) / 4) / 1e9


def main() -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["llama-2-7b", "llama-3.1-8b"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for name in options.models:
        for num_tokens in options.tokens:
            for checkpointing in CHECKPOINTING:
                peaks = {
                    objective: count_at_depths(MODELS[name], num_tokens, objective, checkpointing)
                    for objective in OBJECTIVES
                }
                results.append({
                    "model": name, "tokens": f"2 x {num_tokens}", "rank": RANK, "checkpointing": checkpointing,
                    "peak_gb": {objective: round(peak, 3) for objective, peak in peaks.items()},
                    "to_sft": {objective: round(peak / peaks["sft"], 4) for objective, peak in peaks.items()},
                })  # fmt: skip
                print(json.dumps(results[-1]), flush=True)
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
