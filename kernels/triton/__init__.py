"""The kernels in Triton, and what chooses, compiles and launches them."""
