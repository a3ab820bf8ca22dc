"""Merge an adapter into 16-bit weights, file by file, and verify the result."""
