"""The reverse-diffusion chain as kernels: tensors in, tensors out, nothing of the rest of `dql` imported."""

if __name__ != "dql.kernels":
    raise ImportError(
        "this folder is the package dql.kernels, not a top-level module: install the project "
        "(pip install -e .) and import dql.kernels"
    )
