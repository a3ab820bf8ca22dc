"""Memory of the kernels that oneDNN compiles for a mixture of experts on a CPU, and keeps. No torch.

Each shape of a 16-bit product has a kernel of its own. The number of tokens of an expert is another in each layer and step;
it is padded (`padded_tokens`), so that few numbers occur.
"""

from collections.abc import Sequence

from qlora_train.kernels.block_sizes import padded_tokens
from qlora_train.planning.model_shape import ModelShape
from qlora_train.utils.cpu_memory import MAX_KERNELS

KERNEL_BYTES = 570_000
"""Of one shape (measured: oneDNN 3.12, AVX512 with bfloat16)."""
BASE_PRODUCTS, LORA_PRODUCTS = 2, 6
"""Of an expert matrix: forward and backward; with LoRA two more forward, and four backward."""
MIN_SHARE, MAX_SHARE = 0.5, 2.0
"""Fewest and most tokens of an expert, relative to even routing."""


def expert_kernels_bytes(model: ModelShape, micro_batches: Sequence[int]) -> int:
    """Return the bytes of the kernels of a mixture's experts, for micro-batches of these numbers of tokens."""
    products: dict[tuple[int, int, int], int] = {}
    for layer in model.layers:
        for experts in layer.experts:
            count = BASE_PRODUCTS + (LORA_PRODUCTS if experts.is_adapted else 0)
            for num_tokens in micro_batches:
                for padded in _numbers_of_tokens(num_tokens * layer.num_experts_per_token / experts.count):
                    products[padded, experts.in_features, experts.out_features] = count
    return KERNEL_BYTES * min(MAX_KERNELS, sum(products.values()))


def _numbers_of_tokens(even: float) -> set[int]:
    """Return the padded numbers of tokens of an expert, which has `even` of them on average."""
    numbers = range(max(1, int(MIN_SHARE * even)), max(1, int(MAX_SHARE * even)) + 1)
    return {padded_tokens(number) for number in numbers}
