"""What a problem of `bench_gpu.py` costs a GPU at least, by counting: the figure that a device time stands beside.

    bound = max(products, special functions, bytes) + launches + dependent layers

The first three overlap at best, the largest remains; the last two are latency, which one call cannot hide. The same
bound holds for every backend: it is counted from the problem, not from a kernel.

    products            floating point operations over the rate of torch's matrix product in that precision, measured
                        in the same run. float32 may be made of three tf32 products, where those are faster
    special functions   two results a Mish (an exponential, a reciprocal), 16 a clock and multiprocessor, at the highest
                        clock. Those of the noise are not counted
    bytes               inputs and outputs, at the rate of torch's copy in the same run; of a backward pass also one
                        number for each hidden unit and step, written and read back, if they exceed the L2 cache
    launches            one after the other, 2.0 us each: ASSUMED, not measured
    dependent layers    500 cycles each, what a product, an activation and an exchange within a cluster are estimated to
                        take when the weights are on the chip: ASSUMED, not measured

Of the products those are left out that need not be made again: the states' part of the first layer is the same in every
step. A device time may fall below its bound where an assumption was too high.
"""

from dataclasses import dataclass

from rivals import A, H, S, T

LAYERS = 3  # hidden ones, of the denoiser and of each critic
FORWARD, BACKWARD, SELECT = "sample, forward", "sample, forward and backward", "select"
SPECIAL_A_MISH, SPECIAL_A_CLOCK = 2, 16
LAUNCH_SECONDS, LAYER_CYCLES = 2.0e-6, 500
# the chain; and the chain backwards, products, their sums; of select the critics' prologue, critics and draw
LAUNCHES = {FORWARD: 1, BACKWARD: 4, SELECT: 4}
_HIDDEN = (LAYERS - 1) * H * H  # multiply-adds of a row and step between hidden layers
_PARAMETERS = (A + 16 + S + 1) * H + (LAYERS - 1) * (H + 1) * H + (H + 1) * A + 2 * 32 * 16 + 48


@dataclass(frozen=True)
class DeviceFacts:
    """What a bound needs to know of a GPU.

    Attributes:
        multiprocessors: of the GPU.
        clock: the multiprocessors' highest, in Hz.
        flops: FLOP/s of a matrix product by precision, measured.
        bytes_per_second: of device memory, read and written, measured.
        l2_bytes: of the L2 cache.
    """

    multiprocessors: int
    clock: float
    flops: dict[str, float]
    bytes_per_second: float
    l2_bytes: int


@dataclass(frozen=True)
class Bound:
    """The parts of a bound, in microseconds."""

    products: float
    special: float
    bytes: float
    launches: float
    layers: float

    @property
    def us(self) -> float:
        return max(self.products, self.special, self.bytes) + self.launches + self.layers

    @property
    def parts(self) -> list[float]:
        """In the order of the attributes."""
        return [self.products, self.special, self.bytes, self.launches, self.layers]


def bound_us(problem: str, B: int, precision: str, device: DeviceFacts) -> float:
    """The bound in microseconds, see the module; `bound` gives its parts."""
    return bound(problem, B, precision, device).us


def bound(problem: str, rows: int, precision: str, device: DeviceFacts) -> Bound:
    """The parts of a bound.

    Args:
        problem: FORWARD, BACKWARD or SELECT.
        rows: B; of SELECT the candidates N of one state.
        precision: "fp32", "tf32" or "bf16".
        device: what it runs on.
    """
    chain = 2 * (T * (A * H + _HIDDEN + H * A) * rows + S * H * (1 if problem == SELECT else rows))
    activations = T * LAYERS * H * rows
    moved = 4 * (_PARAMETERS + (S + A) * rows)
    layers = T * (LAYERS + 1)
    if problem == BACKWARD:  # the activations' slopes are by-products of a forward pass
        chain, layers = 3 * chain, 2 * layers
        saved = activations * (2 if precision == "bf16" else 4)
        moved += 4 * (_PARAMETERS + A * rows) + (2 * saved if saved > device.l2_bytes else 0)
    elif problem == SELECT:
        chain += 2 * 2 * ((A * H + _HIDDEN + H) * rows + S * H)
        activations += 2 * LAYERS * H * rows
        moved += 2 * 4 * _PARAMETERS
        layers += LAYERS + 1
    special = SPECIAL_A_MISH * activations / (SPECIAL_A_CLOCK * device.multiprocessors * device.clock)
    seconds = (
        chain / _rate(precision, device.flops),
        special,
        moved / device.bytes_per_second,
        LAUNCHES[problem] * LAUNCH_SECONDS,
        layers * LAYER_CYCLES / device.clock,
    )
    return Bound(*(1e6 * part for part in seconds))


def _rate(precision: str, flops: dict[str, float]) -> float:
    return max(flops["fp32"], flops["tf32"] / 3) if precision == "fp32" else flops[precision]
