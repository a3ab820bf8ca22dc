"""The peak rate of matrix products: of known GPUs from NVIDIA's data sheets, of a CPU measured."""

import re
import time
from dataclasses import dataclass
from functools import cache

import torch

TFLOPS_16_BIT = (
    (r"B200", 2250.0),
    (r"GH200", 989.0),
    (r"H200 NVL", 835.0),
    (r"H200", 989.0),
    (r"H100 NVL", 835.0),
    (r"H100 PCIe", 756.0),
    (r"H100", 989.0),
    (r"A100", 312.0),
    (r"A30", 165.0),
    (r"A40", 149.7),
    (r"A10", 125.0),
    (r"L40S", 362.0),
    (r"L40", 181.0),
    (r"L4", 121.0),
    (r"RTX A6000", 154.8),
    (r"RTX 4090", 165.2),
    (r"RTX 3090", 71.0),
    (r"T4", 65.0),
    (r"V100-SXM2", 125.0),
    (r"V100-PCIE", 112.0),
)
"""Dense 16-bit tensor-core products with float32 sums, without sparsity; the first row whose words the name has."""
PRODUCT_SIZE, NUM_PRODUCTS = 1024, 5
"""Of the measurement on a CPU: about 0.1 s."""


@dataclass(frozen=True, slots=True)
class PeakFlops:
    """Floating-point operations per second, and where the number is from."""

    per_second: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype) -> PeakFlops | None:
    """Return the peak of a device for products in a dtype; None if it is unknown."""
    if device.type == "cpu":
        return PeakFlops(_measured(dtype), f"{PRODUCT_SIZE} x {PRODUCT_SIZE} products, measured")
    name = torch.cuda.get_device_name(device)
    tflops = data_sheet_tflops(name) if dtype in (torch.float16, torch.bfloat16) else None
    return None if tflops is None else PeakFlops(1e12 * tflops, f"data sheet of {name}")


def data_sheet_tflops(name: str) -> float | None:
    """Return the 16-bit peak of a GPU by its name in CUDA, in TFLOP/s; None if it is not listed.

    A part of a GPU (MIG) and variants, such as Laptop or Max-Q GPUs, are not listed: they are slower than the data sheet.
    """
    if re.search(r"\bMIG\b|Laptop|Max-Q|Mobile|\b4090 D\b", name):
        return None
    return next((tflops for words, tflops in TFLOPS_16_BIT if re.search(rf"\b{words}\b", name)), None)


@cache
@torch.no_grad()
def _measured(dtype: torch.dtype) -> float:
    """Return the rate of the fastest of some square products, with the threads of this process."""
    a = torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype)
    seconds = []
    for _ in range(NUM_PRODUCTS):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return float(2 * PRODUCT_SIZE**3 / min(seconds))
