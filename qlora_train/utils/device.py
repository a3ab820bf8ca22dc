"""The device of this process. Imports torch only: importing bitsandbytes initialises CUDA."""

import gc
import logging
import os
import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar

import torch

from qlora_train.utils.constants import FRAGMENTED_SHARE, UNTOUCHED_SHARE
from qlora_train.utils.cpu_memory import limit_kernel_caches
from qlora_train.utils.errors import ModelError, first_line, is_out_of_memory
from qlora_train.utils.launcher import clear_launcher_environment
from qlora_train.utils.nvidia_driver import GET_TORCH, HIDDEN, ON_CPU, driver_version, gpu_problem

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def prepare_cuda(local_rank: int = 0) -> None:
    """Restrict CUDA to one visible GPU, with expandable segments; call before CUDA is initialised.

    Args:
        local_rank: position of the GPU among the visible ones; a launcher may show each process its own GPU only.

    Raises:
        ModelError: fewer GPUs are visible.
    """
    expand_segments()
    # counting the GPUs would initialise CUDA where NVML is missing
    setting = os.environ.get("CUDA_VISIBLE_DEVICES")
    visible = [str(local_rank)] if setting is None else [name.strip() for name in setting.split(",")]
    if len(visible) == 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[0]
    elif local_rank < len(visible):
        os.environ["CUDA_VISIBLE_DEVICES"] = visible[local_rank]
    else:
        raise ModelError(
            f"GPU: process {local_rank} of this machine has none (CUDA_VISIBLE_DEVICES={setting}); start as many processes "
            "as there are GPUs"
        )


def select_device() -> torch.device:
    """Return the first visible GPU, else the CPU, and log it.

    Raises:
        ModelError: the process is one of several, or the machine's GPU cannot be used.
    """
    clear_launcher_environment()
    expand_segments()
    if torch.cuda.is_available():
        device = torch.device("cuda", 0)
        _log_once(describe_gpu(device))
        return device
    if problem := gpu_problem():
        raise ModelError(problem)
    limit_kernel_caches()
    _log_once(describe_cpu())
    return torch.device("cpu")


@cache
def _log_once(device: str) -> None:
    logger.info("device: %s", device)


def describe_cpu() -> str:
    """Return the threads of this process, and why it does not use a GPU."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN
    reason = "CUDA_VISIBLE_DEVICES hides all GPUs" if hidden else "no CUDA GPU found"
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''} ({reason})"


def describe_gpu(device: torch.device) -> str:
    """Return name, memory, architecture and driver; raise a ModelError if torch cannot use the GPU."""
    try:
        gpu = torch.cuda.get_device_properties(device)
    except (RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        raise ModelError(f"GPU: CUDA fails: {first_line(error).rstrip('.')}; see nvidia-smi, {ON_CPU}") from error
    capability = 10 * gpu.major + gpu.minor
    if torch.version.cuda:
        _check_kernels(gpu.name, capability)
    architecture = f"sm_{capability}" if torch.version.cuda else gpu.gcnArchName
    parts = [gpu.name, f"{gpu.total_memory / 2**30:.1f} GiB", architecture]
    if version := driver_version():
        parts.append(f"driver {version}")
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        parts.append(f"CUDA_VISIBLE_DEVICES={visible}")
    return ", ".join(parts)


def _check_kernels(gpu: str, capability: int) -> None:
    """Raise a ModelError if torch has no kernels for a compute capability (times ten).

    Kernels for sm_80 run on 8.0 to 8.9; compute_120 is PTX, which the driver compiles for newer GPUs.
    """
    built = {name: int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list()}  # such as sm_75, sm_90a
    if not any(
        number <= capability and (number // 10 == capability // 10 or name.startswith("compute"))
        for name, number in built.items()
    ):
        oldest, newest = min(built.values()), max(built.values())
        raise ModelError(
            f"GPU: {gpu} has compute capability {capability / 10}, and torch {torch.__version__} has kernels for "
            f"{oldest / 10} to {newest / 10}; install torch for {'an older' if capability < oldest else 'a newer'} CUDA "
            f"({GET_TORCH}), {ON_CPU}"
        )


ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""The variable of torch 2.10 and newer, and the deprecated one."""
EXPANDABLE = "expandable_segments:True"


def expand_segments() -> None:
    """Enable CUDA's expandable segments, against fragmentation by batches of different lengths; the user's value wins.

    Windows does not support them, and WSL may fail with them (pytorch/pytorch#192330).
    """
    supported = sys.platform == "linux" and "microsoft" not in platform.release().lower()
    if supported and not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = EXPANDABLE


DETERMINISTIC_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "FLASH_ATTENTION_DETERMINISTIC": "1"}
"""Read by cuBLAS before its first matrix product, and by Transformers at each call of flash-attn."""


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Use deterministic algorithms only, if enabled, and restore torch's settings; enter before the model is loaded.

    Other operations raise the `RuntimeError` that `errors.explain` knows. FlashAttention, memory-efficient attention and
    `varlen_attn` are deterministic with this setting (torch's attention_backward.cu); cuDNN's attention is disabled.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    uses_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    debugging: Any = torch.utils.deterministic
    fills, environment = debugging.fill_uninitialized_memory, dict(os.environ)
    os.environ.update(DETERMINISTIC_ENVIRONMENT)
    debugging.fill_uninitialized_memory = False  # it would write every new tensor twice
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.use_deterministic_algorithms(True)
    logger.debug("deterministic algorithms: on (run.deterministic: true)")
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cuda.enable_cudnn_sdp(uses_cudnn)
        debugging.fill_uninitialized_memory = fills
        for name in DETERMINISTIC_ENVIRONMENT:
            os.environ.pop(name, None)
        os.environ.update({name: environment[name] for name in DETERMINISTIC_ENVIRONMENT if name in environment})


def spare_bytes(device: torch.device, peak_bytes: int) -> int:
    """Return the bytes of GPU memory that are free beyond a peak of `peak_bytes` of this process; may be negative."""
    free, total = torch.cuda.mem_get_info(device)
    expands = any(EXPANDABLE in os.environ.get(name, "") for name in ALLOCATOR_VARIABLES)
    share = UNTOUCHED_SHARE if expands else FRAGMENTED_SHARE
    return int(free + torch.cuda.memory_reserved(device) - peak_bytes - share * total)


def free_memory() -> None:
    """Release the memory of unreferenced models, including reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def catch_out_of_memory(action: Callable[[], Result]) -> tuple[Result | None, str | None]:
    """Return the result of `action`, or None and the message if memory ran out; its memory is then released."""
    try:
        return action(), None
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = first_line(error)
    free_memory()  # outside `except`, where the error's frames are no longer referenced
    return None, reason
