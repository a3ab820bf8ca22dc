"""Sizes of the adapter check, without torch, as the disk plan reads them too."""

NUM_COMPARED_ROWS, MAX_TOKENS = 4, 128
"""Rows on which predictions are compared, and tokens of each: the check takes seconds."""
TOP_K = 256
"""Most probable tokens that are compared."""
MAX_REFERENCE_BYTES = NUM_COMPARED_ROWS * MAX_TOKENS * TOP_K * 8 + 1024 * 1024
"""Disk space of the predictions (an id and a float32 each) and texts."""
