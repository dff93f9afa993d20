"""The CPU extension, `dql.kernels._native` of csrc/cpu/: tensors in, tensors out."""
