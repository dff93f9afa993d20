"""What one multiprocessor of each GPU architecture has that a kernel must fit."""

from dataclasses import dataclass

KB = 1024
RESERVED = KB  # of shared memory, that the driver keeps of every block from sm_80 up


@dataclass(frozen=True)
class Limits:
    """What one multiprocessor has; memory in bytes.

    Attributes:
        shared_per_block: shared memory that a block may ask for (opt-in), without what the driver reserves.
        shared: shared memory of a multiprocessor, that reserve included.
        warps: resident at a time.
        blocks: resident at a time.
        registers: of 32 bits.
        tensor_memory: columns of tensor memory (tcgen05).
        warps_per_block: 1,024 threads.
    """

    shared_per_block: int
    shared: int
    warps: int
    blocks: int
    registers: int = 65536
    tensor_memory: int = 0
    warps_per_block: int = 32


# CUDA C++ Programming Guide, "Compute Capabilities": technical specifications per compute capability
ARCHITECTURES: dict[int, Limits] = {
    80: Limits(163 * KB, 164 * KB, warps=64, blocks=32),
    86: Limits(99 * KB, 100 * KB, warps=48, blocks=16),
    89: Limits(99 * KB, 100 * KB, warps=48, blocks=24),
    90: Limits(227 * KB, 228 * KB, warps=64, blocks=32),
    100: Limits(227 * KB, 228 * KB, warps=64, blocks=32, tensor_memory=512),
    120: Limits(99 * KB, 100 * KB, warps=48, blocks=24),
}
