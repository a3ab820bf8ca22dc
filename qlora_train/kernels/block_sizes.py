"""Block and tile sizes of the kernels, in a file without torch, since the memory planner reads them too."""

BLOCK_SIZE = 64
"""Weights per absmax."""
ABSMAX_BLOCK_SIZE = 256
"""Absmax values per scale of the second level, with double quantization."""
TILE_ROWS = 4096
"""Rows that a tiled function computes at once: as many as a GPU needs for its full matmul throughput."""


MIN_EXPERT_TOKENS = 32
"""On a CPU, an expert's tokens are padded to a multiple of at least this many."""


def padded_tokens(count: int) -> int:
    """Return the next multiple of 32 or, if that is more, of an eighth to a quarter of the number of tokens."""
    multiple = max(MIN_EXPERT_TOKENS, 2 ** (count.bit_length() - 3))
    return -(-count // multiple) * multiple
