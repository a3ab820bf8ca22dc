"""Write an adapter as plain LoRA for llama.cpp, which scales every pair by one ``lora_alpha / rank``.

rsLoRA divides by the square root of the rank, and patterns give layers their own alphas; the difference is multiplied into
B. What a pair of matrices cannot express is refused.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from qlora_train.adapters.adapter_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qlora_train.export.merging.adapter_deltas import AdapterFile, LowRank
from qlora_train.utils.errors import ExportError, listed


def write_plain_adapter(adapter: AdapterFile, folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Write config, weights and a card that holds the model's name into an empty folder; return the weights by name.

    Raises:
        ExportError: the adapter has DoRA, fully trained modules, trained token rows, or LoRA on experts or on layers stored
            as (in, out).
    """
    unsupported = [
        target
        for target, update in adapter.updates.items()
        if not isinstance(update, LowRank) or update.magnitude or update.transposed or not target.endswith(".weight")
    ]
    if unsupported:
        raise ExportError(
            f"{adapter.path}: {len(unsupported)} changes that llama.cpp's LoRA cannot hold (DoRA, experts, full modules, "
            f"token rows): {listed(unsupported, 3)}; export the merged model: --format gguf"
        )
    alpha = adapter.settings.lora_alpha
    tensors: dict[str, torch.Tensor] = {}
    for update in adapter.updates.values():
        assert isinstance(update, LowRank)
        a, b = adapter.read(update.a), adapter.read(update.b)
        tensors[update.a] = a
        tensors[update.b] = b * (update.scale * a.shape[0] / alpha)
    save_file(tensors, str(folder / ADAPTER_WEIGHTS))
    config = {"peft_type": "LORA", "r": adapter.settings.r, "lora_alpha": alpha}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(f"---\nmodel_name: {json.dumps(name)}\n---\n", encoding="utf-8")
    return tensors
