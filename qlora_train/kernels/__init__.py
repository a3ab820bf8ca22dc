"""Fused kernels: operations with a torch reference, and Triton kernels that match it."""
