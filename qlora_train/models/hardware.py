"""What the machine decides: the compute dtype and the attention kernel, each with its reason."""

import importlib
import importlib.util
import logging
from typing import Literal

import torch

from qlora_train.architectures import Architecture
from qlora_train.config.preflight import FLASH_ATTENTION, missing_attention
from qlora_train.utils.errors import ConfigError, first_line

logger = logging.getLogger(__name__)

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Attention = Literal["auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3"]


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
    setting: Attention, architecture: Architecture, device: torch.device, dtype: torch.dtype, *, has_sdpa: bool
) -> str:
    """Return the attention implementation to load the model with; `auto` never takes FlashAttention's package.

    sdpa has FlashAttention's kernel, and with it rows train padding-free.

    Args:
        setting: the config's `model.attn_implementation`.
        architecture: what it needs where the usual choice would be wrong.
        device: where the model will run.
        dtype: of its products.
        has_sdpa: Transformers has sdpa for the architecture.

    Raises:
        ConfigError: sdpa is asked for where it computes something else than the architecture means, or a kernel whose
            package, GPU or dtype is not there.
    """
    if setting == "sdpa" and architecture.attention_reason:
        raise ConfigError(
            f"model.attn_implementation: sdpa is wrong for {architecture.model_type}: {architecture.attention_reason}; "
            f"use auto or {architecture.attention}"
        )
    if setting in FLASH_ATTENTION and (problem := missing_attention(setting) or _flash_problem(setting, device, dtype)):
        raise ConfigError(problem)
    if setting != "auto":
        name, reason = str(setting), "set in the config"
    elif architecture.attention_reason:
        name, reason = architecture.attention, architecture.attention_reason
    elif has_sdpa:
        name, reason = "sdpa", "PyTorch's fused kernels"
    else:
        name, reason = "eager", "Transformers has nothing faster for this architecture"
    logger.info("attention: %s (%s)", name, reason)
    return name


def _flash_problem(setting: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a FlashAttention package that is installed cannot be used, or None."""
    module, package = FLASH_ATTENTION[setting]
    where, instead = f"model.attn_implementation: {setting}", "use auto or sdpa"
    if device.type == "cpu":
        return f"{where} needs a GPU, and this process has none; {instead}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return (
            f"{where} needs compute capability 8.0, which {torch.cuda.get_device_name(device)} does not have; {instead}"
        )
    if dtype == torch.float32:
        return f"{where} has no float32; {instead}, or set quantization.bnb_4bit_compute_dtype: bfloat16"
    try:
        if importlib.util.find_spec(module):  # otherwise the package `kernels` fetches it
            importlib.import_module(module)
    except Exception as error:
        return (
            f"{where}: {package} is installed and cannot be imported: {first_line(error)}; install a build for torch "
            f"{torch.__version__}, or {instead}"
        )
    return None
