"""Kernels for NVIDIA GPUs in CUDA C++, compiled when first needed."""
