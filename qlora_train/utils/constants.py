"""Constants shared by several packages."""

IGNORE_INDEX = -100
"""Label of a token without loss, as in PyTorch's cross-entropy and Transformers."""

GPU_TOKENS = 8192
"""Token budget of padding-free micro-batches on a GPU. With 2,048 tokens of a 7B model, Python takes about as long to
launch an H100's kernels as it to run them (counted, not measured)."""
CACHE_SHARE = 0.25
"""Share of a machine's free memory that `train.dequantized_cache_gb: auto` uses on a CPU, for all processes together."""
UNTOUCHED_SHARE, FRAGMENTED_SHARE = 0.05, 0.15
"""Share of a GPU's memory reserved for libraries and fragmentation, with and without expandable segments."""
