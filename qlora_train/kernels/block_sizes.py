"""Block and tile sizes of the kernels, in a file without torch, since the memory planner reads them too."""

BLOCK_SIZE = 64
"""Weights per absmax."""
ABSMAX_BLOCK_SIZE = 256
"""Absmax values per scale of the second level, with double quantization."""
TILE_ROWS = 4096
"""Rows that a tiled function computes at once: as many as a GPU needs for its full matmul throughput."""
