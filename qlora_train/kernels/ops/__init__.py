"""The operations as Triton kernels, one a file: what they compute is defined by the plain torch code of the same name.

A file here imports Triton, and is imported where an operation meets a tensor on a GPU. Each number is rounded to the stored
dtype where the plain code rounds it, and no product and sum share one rounding (`enable_fp_fusion=False`).
"""
