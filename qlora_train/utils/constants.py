"""Constants shared by several packages."""

IGNORE_INDEX = -100
"""Label of a token without loss, as in PyTorch's cross-entropy and Transformers."""
