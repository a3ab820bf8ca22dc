"""Choose the compute dtype and the attention implementation for the hardware."""

import importlib
import importlib.util
import logging

import torch

from qlora_train.architectures import Architecture
from qlora_train.config.preflight import FLASH_ATTENTION, missing_attention
from qlora_train.utils.errors import ConfigError, first_line

logger = logging.getLogger(__name__)


def choose_compute_dtype(setting: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products; `auto` chooses a fast one that needs no loss scaler."""
    if setting != "auto":
        dtype, reason = getattr(torch, setting), "set in the config"
        if setting == "bfloat16" and device.type == "cuda" and not _supports_bfloat16():
            logger.warning(
                "compute dtype: %s emulates bfloat16, slowly and without fused attention; use auto or float16",
                torch.cuda.get_device_name(device),
            )
    else:
        dtype, reason = automatic_compute_dtype(device)
    assert isinstance(dtype, torch.dtype)
    logger.debug("compute dtype: %s (%s)", str(dtype).removeprefix("torch."), reason)
    return dtype


def automatic_compute_dtype(device: torch.device) -> tuple[torch.dtype, str]:
    """Return the fastest compute dtype of a device that needs no loss scaler, and the reason."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if _supports_bfloat16():
            return torch.bfloat16, f"{name} supports bfloat16"
        return torch.float16, f"{name} does not support bfloat16"
    if torch.backends.cpu.get_cpu_capability().startswith("AVX512") or torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16, "this CPU has AVX512"
    return torch.float32, "bfloat16 is slower than float32 on this CPU"


def _supports_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def choose_attention(
    setting: str, architecture: Architecture, device: torch.device, dtype: torch.dtype, *, has_sdpa: bool
) -> str:
    """Return the attention implementation; `auto` never chooses the flash-attn package, whose kernel sdpa contains.

    Args:
        setting: `model.attn_implementation`.
        has_sdpa: whether Transformers supports sdpa for the architecture.

    Raises:
        ConfigError: sdpa for an architecture that it computes wrongly, or FlashAttention without its package, GPU or dtype.
    """
    if setting == "sdpa" and architecture.attention_reason:
        raise ConfigError(
            f"model.attn_implementation: sdpa is wrong for {architecture.model_type}: {architecture.attention_reason}; "
            f"use auto or {architecture.attention}"
        )
    if setting in FLASH_ATTENTION and (problem := missing_attention(setting) or _flash_problem(setting, device, dtype)):
        raise ConfigError(problem)
    if setting != "auto":
        name, reason = setting, "set in the config"
    elif architecture.attention_reason:
        name, reason = architecture.attention, architecture.attention_reason
    elif has_sdpa:
        name, reason = "sdpa", "PyTorch's fused kernels"
    else:
        name, reason = "eager", "Transformers supports nothing faster for this architecture"
    logger.debug("attention: %s (%s)", name, reason)
    return name


def _flash_problem(setting: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why an installed FlashAttention package cannot be used, or None."""
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
        if importlib.util.find_spec(module):  # otherwise the package `kernels` downloads it
            importlib.import_module(module)
    except Exception as error:
        return (
            f"{where}: {package} is installed and cannot be imported: {first_line(error)}; install a build for torch "
            f"{torch.__version__}, or {instead}"
        )
    return None
