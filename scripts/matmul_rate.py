"""The machine's best rate of bfloat16 matrix products: large square ones, and those of a model's own linear layers.

`scripts/bench.py` runs it in a process of its own, with the threads that the trainers get, before and after each round: a
rate that moves in between says that the machine was not the same for all.

Example: ``python scripts/matmul_rate.py ASKED.json RESULT.json``, ASKED: ``{"tokens": 2048, "linears": [[576, 1536]]}``
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
"""Sizes of the square products; on a CPU the smaller may be the quicker, as it stays in its caches."""
SECONDS = 0.2
"""How long each product is repeated; the best time counts."""
MIN_REPEATS = 3


def main() -> None:
    """Measure and write."""
    asked, result = (Path(argument) for argument in sys.argv[1:])
    wanted = json.loads(asked.read_text())
    result.write_text(json.dumps(measured(wanted["tokens"], [tuple(linear) for linear in wanted["linears"]])))


def measured(num_tokens: int, linears: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Return operations a second of the best square product, and of the layers' products forward and backward together.

    Args:
        num_tokens: rows of the layers' inputs.
        linears: (in, out) of each layer.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flops = seconds = 0.0
    for (inputs, outputs), count in Counter(linears).items():
        weight = _random(outputs, inputs, device)
        x, grad = _random(num_tokens, inputs, device), _random(num_tokens, outputs, device)
        seconds += count * (
            _best_seconds(lambda x=x, w=weight: x @ w.T) + _best_seconds(lambda g=grad, w=weight: g @ w)
        )
        flops += count * 4 * num_tokens * inputs * outputs
    rates = {size: _square_rate(size, device) for size in SQUARES[device.type]}
    best = max(rates, key=rates.__getitem__)
    return {
        "square": best,
        "square_flops_per_second": rates[best],
        "tokens": num_tokens,
        "model_flops_per_second": flops / seconds,
        "threads": torch.get_num_threads(),
    }


def _square_rate(size: int, device: torch.device) -> float:
    one, other = _random(size, size, device), _random(size, size, device)
    return 2 * size**3 / _best_seconds(lambda: one @ other)


def _random(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    """Return random numbers: a product of zeros draws less power and runs faster."""
    return torch.randn(rows, columns, device=device, dtype=torch.bfloat16)


def _best_seconds(product: Callable[[], torch.Tensor]) -> float:
    device = product().device  # warms up
    best, repeats, end = float("inf"), 0, time.perf_counter() + SECONDS
    while repeats < MIN_REPEATS or time.perf_counter() < end:
        _wait(device)
        began = time.perf_counter()
        product()
        _wait(device)
        best, repeats = min(best, time.perf_counter() - began), repeats + 1
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
