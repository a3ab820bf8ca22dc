"""Numbers of logits that exist at once, in a file without torch, since the memory planner reads them too."""

EVAL_LOGITS_BYTES = 64 << 20
"""Max float32 logits at once in evaluation."""
CHUNK_BYTES = {"cpu": 60 << 20, "cuda": 512 << 20}
"""Max logits at once in training, counted as float32: efficient matmuls, and in 16 bits at most the 32 MB that a CPU's
allocator returns without a system call."""
LABEL_MULTIPLE = {"cpu": 32, "cuda": 1}
"""Chunks are zero-padded to a multiple: oneDNN compiles a kernel for every new number of rows, 14 ms for 49,152 columns."""
MIN_CHUNK_TOKENS = 64
"""Each chunk reads the whole head."""


def max_chunk_tokens(device_type: str, vocab_size: int) -> int:
    """Return the number of labels per chunk in training, on a device of type `cpu` or `cuda`."""
    return max(MIN_CHUNK_TOKENS, CHUNK_BYTES[device_type] // (4 * vocab_size))
