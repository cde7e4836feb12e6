"""The CUDA backend: the kernels of csrc/cuda."""
