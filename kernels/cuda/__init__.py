"""The CUDA kernels of csrc/cuda/: the extension `dql.kernels._cuda`, buffers and launches."""
