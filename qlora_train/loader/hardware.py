"""What the machine decides: the compute dtype and the attention kernel, each with its reason."""

import importlib.util
import logging
from dataclasses import dataclass
from typing import Literal

import torch

from qlora_train.architectures import Architecture
from qlora_train.errors import ConfigError
from qlora_train.preflight import FLASH_ATTENTION, missing_attention

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]


@dataclass(frozen=True)
class Kernels:
    """Which attention kernels Transformers has for an architecture, beside plain matrix products."""

    sdpa: bool = True
    flash: bool = True


def choose_compute_dtype(setting: Dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of the matrix products; `auto` takes what the hardware multiplies fast without a loss scaler."""
    if setting != "auto":
        dtype, reason = getattr(torch, setting), "set in the config"
        if setting == "bfloat16" and device.type == "cuda" and not _multiplies_bfloat16():
            logger.warning(
                "compute dtype: %s emulates bfloat16, slowly and without fused attention; use auto or float16",
                torch.cuda.get_device_name(device),
            )
    elif device.type == "cuda":
        fast = _multiplies_bfloat16()
        dtype = torch.bfloat16 if fast else torch.float16
        name = torch.cuda.get_device_name(device)
        reason = f"{name} multiplies bfloat16" if fast else f"{name} has no bfloat16 units"
    elif torch.backends.cpu.get_cpu_capability().startswith("AVX512") or torch.cpu._is_avx512_bf16_supported():
        dtype, reason = torch.bfloat16, "this CPU has AVX512"
    else:
        dtype, reason = torch.float32, "this CPU multiplies bfloat16 slower than float32"
    assert isinstance(dtype, torch.dtype)
    logger.info("compute dtype: %s (%s)", str(dtype).removeprefix("torch."), reason)
    return dtype


def _multiplies_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_attention(
    setting: Attention, architecture: Architecture, device: torch.device, dtype: torch.dtype, kernels: Kernels
) -> str:
    """Return the attention implementation to load the model with.

    Args:
        setting: the config's `model.attn_implementation`.
        architecture: what it needs where the usual choice would be wrong.
        device: where the model will run.
        dtype: of its products.
        kernels: what Transformers has for the architecture.

    Raises:
        ConfigError: sdpa is asked for where it computes something else than the architecture means, or a kernel whose
            package or GPU is not there.
    """
    if setting == "sdpa" and architecture.attention_reason:
        raise ConfigError(
            f"model.attn_implementation: sdpa is wrong for {architecture.model_type}: {architecture.attention_reason}; "
            f"use auto or {architecture.attention}"
        )
    if problem := missing_attention(setting):
        raise ConfigError(problem)
    if setting in FLASH_ATTENTION and device.type == "cpu":
        raise ConfigError(
            f"model.attn_implementation: {setting} needs a GPU, and this process has none; use auto or sdpa"
        )
    if setting != "auto":
        name, reason = str(setting), "set in the config"
    elif (obstacle := _no_flash_attention(architecture, device, dtype, kernels)) is None:
        name, reason = "flash_attention_2", "flash-attn is installed"
    elif architecture.attention_reason:
        name, reason = architecture.attention, architecture.attention_reason
    elif kernels.sdpa:
        name, reason = "sdpa", obstacle
    else:
        name, reason = "eager", "Transformers has nothing faster for this architecture"
    logger.info("attention: %s (%s)", name, reason)
    return name


def _no_flash_attention(
    architecture: Architecture, device: torch.device, dtype: torch.dtype, kernels: Kernels
) -> str | None:
    """Return why flash-attn is not for this model here, or None when it is."""
    if device.type != "cuda":
        return "on a CPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"flash-attn needs a newer GPU than {torch.cuda.get_device_name(device)}"
    if dtype == torch.float32:
        return "flash-attn has no float32"
    if not kernels.flash:
        return "Transformers has no flash-attn for this architecture"
    return None if architecture.known else "the architecture is not in the table"
