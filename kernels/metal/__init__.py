"""Kernels for Apple GPUs, in the Metal Shading Language."""
