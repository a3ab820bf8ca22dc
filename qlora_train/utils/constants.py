"""Numbers that several packages must agree on."""

IGNORE_INDEX = -100
"""Label of a token without loss, as in PyTorch's cross-entropy and Transformers."""
