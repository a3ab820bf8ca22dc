"""A run's adapter as the simplest LoRA there is, for programs that know no other.

llama.cpp scales every pair by ``lora_alpha / rank`` with one alpha for all. rsLoRA divides by the root of the rank, and
patterns give layers alphas of their own: a file converted as it is would be loaded, run, and be another model. Here what
differs is multiplied into B. What a pair of matrices cannot say is refused.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_train.export.merging.adapter_deltas import ADAPTER_CONFIG, ADAPTER_WEIGHTS, AdapterFile, LowRank, listed
from qlora_train.utils.errors import ExportError


def write_plain_adapter(adapter: AdapterFile, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write an adapter whose scale is alpha over rank everywhere.

    Args:
        adapter: the run's.
        folder: empty; gets config, weights, and a card that carries the name.
        name: of the model.

    Returns:
        What was written, by the names in the file.

    Raises:
        ExportError: it holds DoRA magnitudes, replaced tensors, trained token rows, or pairs over parameters that are not
            linear layers stored as (out, in).
    """
    others = [target for target, update in adapter.updates.items() if not _is_plain(target, update)]
    if others:
        raise ExportError(
            f"{adapter.path}: {len(others)} changes that llama.cpp's LoRA cannot hold (DoRA, experts, whole tensors, token "
            f"rows): {listed(others, 3)}; export the merged model: --format gguf"
        )
    alpha = float(adapter.config["lora_alpha"])
    tensors: dict[str, torch.Tensor] = {}
    for update in adapter.updates.values():
        assert isinstance(update, LowRank)
        a, b = adapter.read(update.a), adapter.read(update.b)
        tensors[update.a] = a
        tensors[update.b] = b * (update.scale * a.shape[0] / alpha)
    save_file(tensors, str(folder / ADAPTER_WEIGHTS))
    config = {"peft_type": "LORA", "r": adapter.config["r"], "lora_alpha": alpha}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(f"---\nmodel_name: {json.dumps(name)}\n---\n", encoding="utf-8")
    return tensors


def _is_plain(target: str, update: object) -> bool:
    """Say whether an update is a pair of matrices over a linear layer stored as (out, in)."""
    plain = isinstance(update, LowRank) and update.magnitude is None and not update.transposed
    return plain and target.endswith(".weight")
