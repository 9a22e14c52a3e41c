"""Triton kernels for NVIDIA and AMD GPUs. Importing this package imports no Triton; the first launch does."""
