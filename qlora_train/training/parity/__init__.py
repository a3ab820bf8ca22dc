"""Parity checks before step 1: fused kernels, padding-free batches and document isolation against the reference."""
