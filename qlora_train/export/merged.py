"""Load a merged folder as any user would, with Transformers alone, where it fits."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import get_max_memory
from transformers import AutoConfig

from qlora_train.architectures import detect
from qlora_train.device import free_memory
from qlora_train.export.loading_code import needed_attention
from qlora_train.host_memory import available_bytes
from qlora_train.loader.dynamic_rope import forget_longest_row
from qlora_train.loader.towers import text_model

logger = logging.getLogger(__name__)

Placement = dict[str, torch.device] | Literal["auto"]


def load_merged(folder: Path, device: torch.device | str, *, trust_remote_code: bool = False) -> Any:
    """Load a merged folder from disk in the dtype it was written in, placed by `place_for`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    placement = place_for(folder, device)
    model = text_model(config).model_class.from_pretrained(
        folder,
        dtype="auto",
        local_files_only=True,
        device_map=placement,
        # accelerate does not know the limits of containers
        max_memory={**get_max_memory(), "cpu": available_bytes()} if placement == "auto" else None,
        trust_remote_code=trust_remote_code,
        attn_implementation=needed_attention(detect(config.to_dict())),
    )
    forget_longest_row(model)
    return model


def place_for(folder: Path, device: torch.device | str) -> Placement:
    """Return the `device_map` to load a model folder with: the device, or what fits there and the rest in host memory.

    A model that was trained in 4 bits need not fit on the same device in 16.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return {"": device}
    free_memory()
    weights_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    free_bytes, _ = torch.cuda.mem_get_info(device)
    if fits(weights_bytes, free_bytes):
        return {"": device}
    logger.warning(
        "%s: %.1f GB of weights do not fit in the %.1f GB free on %s; the rest stays in host memory, which is slow",
        folder.name, weights_bytes / 1e9, free_bytes / 1e9, device,
    )  # fmt: skip
    return "auto"


def fits(weights_bytes: int, free_bytes: int) -> bool:
    """Say whether weights leave enough of the free memory for the activations of an evaluation."""
    return weights_bytes <= 0.9 * free_bytes
