"""Load a merged folder with Transformers alone, partly in host memory if it does not fit on the GPU."""

import logging
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import get_max_memory
from transformers import AutoConfig

from qlora_train.architectures import detect
from qlora_train.export.loading_code import needed_attention
from qlora_train.models.dynamic_rope import reset_dynamic_rope
from qlora_train.models.text_only import text_model
from qlora_train.utils.device import free_memory
from qlora_train.utils.host_memory import available_bytes

logger = logging.getLogger(__name__)

WEIGHTS_SHARE = 0.9
"""Share of free memory for weights; the rest is for the activations of an evaluation."""
PCIE_BYTES_PER_SECOND = 10e9
"""Assumed, from pageable host memory over PCIe 4.0 x16."""


def load_merged(folder: Path, device: torch.device | str, *, trust_remote_code: bool = False) -> Any:
    """Load a merged folder in the dtype it was written in, with the device map of `choose_device_map`."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    device_map = choose_device_map(folder, device)
    max_memory = None
    if device_map == "auto":  # accelerate fills what it is given and ignores memory limits of containers
        free = {**get_max_memory(), "cpu": available_bytes()}
        max_memory = {name: int(WEIGHTS_SHARE * num_bytes) for name, num_bytes in free.items()}
    model = text_model(config).model_class.from_pretrained(
        folder,
        dtype="auto",
        local_files_only=True,
        device_map=device_map,
        max_memory=max_memory,
        trust_remote_code=trust_remote_code,
        attn_implementation=needed_attention(detect(config.to_dict())),
    )
    reset_dynamic_rope(model)
    return model


def choose_device_map(folder: Path, device: torch.device | str) -> dict[str, torch.device] | Literal["auto"]:
    """Return the device if the weights fit there, else "auto"; 16-bit weights may not fit where 4-bit ones did."""
    num_bytes = streamed_bytes(folder, device)
    if not num_bytes:
        return {"": torch.device(device)}
    logger.warning(
        "%s: %.1f of %.1f GB do not fit on %s and cross PCIe in every forward pass, about %.1f s (one per new token)",
        folder.name, num_bytes / 1e9, weights_bytes(folder) / 1e9, device, num_bytes / PCIE_BYTES_PER_SECOND,
    )  # fmt: skip
    return "auto"


def streamed_bytes(folder: Path, device: torch.device | str) -> int:
    """Return the bytes of weights that do not fit on a GPU and move to it in every forward pass."""
    if torch.device(device).type != "cuda":
        return 0
    free_memory()
    free_bytes, _ = torch.cuda.mem_get_info(torch.device(device))
    return max(0, weights_bytes(folder) - int(WEIGHTS_SHARE * free_bytes))


def weights_bytes(folder: Path) -> int:
    """Return the bytes of a model folder's weights."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
