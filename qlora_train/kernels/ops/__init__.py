"""Operations with a torch reference and, in `<operation>_triton`, Triton kernels, imported only for tensors on a GPU.

Kernels round to the stored dtype where the reference does, and never fuse a product and a sum into one rounding
(`enable_fp_fusion=False`).
"""
