"""Hand-written kernels: Triton for GPUs, C++ for CPUs, and attention by cuDNN."""
