"""What an update of the actor asks of its denoiser, in two launches forward and three back: a chain over a batch's
states, and the noise-prediction loss of the same batch.

    x_t    = sqrt(abar_t) a + sqrt(1 - abar_t) eps                          # [B, A], a timestep t for each row
    loss   = mean (denoiser(x_t, t, s) - eps)^2                             # or - a, of a denoiser that predicts x0

(Diffusion-QL, arXiv 2208.06193, eq. 2; `DiffusionPolicy.bc_loss` is the same in torch.) A row of the loss is one of a
chain of one step at a timestep of its own. So the loss is more programs of the chain's launches, which share what the
prologue makes, and its rows are one more plane in the products of the gradient: see `reverse_diffusion`. The chain is
that of all T steps, whose table of times has every timestep.

The last program of the loss to be done adds up the squares of all, in their order: the same call gives the same bits.

Letters: B states, RP rows in whole tiles, S state size, A action size, T steps, P size of the flat buffer.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..layout import ACTIVATIONS, DenoiserSpec
from ..limits import check_memory, too_many
from .chain import kernel_of_rows, rows_backward, rows_forward
from .chain_gradients import ChainGradients
from .launch import INTERPRETED, Kernel, architecture, fitting, multiprocessors
from .packing import cdiv, packed_sizes
from .prologue import Prologue
from .runner import seed_arguments
from .tiles import Shape, Tile, choose, next_smaller

Tensor = torch.Tensor
_NO_STEP = (0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)  # a x - b eps is the prediction; see `rows_forward`


@triton.jit
def _actor_fwd(
    floats: "*fp32",  # see reverse_diffusion
    operands: "*op",
    steps: "*fp32",  # [K + 1, 8], the last row that of a prediction
    data: "*fp32 any",  # [B, A]
    t: "*i64 any",  # [B]
    q_sample: "*fp32 any",  # [T, 2]: sqrt(abar_t), sqrt(1 - abar_t)
    seed_at: "*i64 any",  # where the chain's seed is, if seed_in_memory
    loss_seed_at: "*i64 any",
    actions: "*fp32",  # [B, A], written
    errors: "*fp32",  # [tiles], written: sums of squares
    counter: "*i32",  # [1], 0 at first
    loss: "*fp32",  # [1], written
    seed: "i64",  # otherwise
    loss_seed: "i64",
    max_action: "fp32",
    share: "fp32",  # 1 / (B A)
    B: "i32",
    K: "i32",  # T, or 0 without a chain
    T: "i32",
    seed_in_memory: "i32",
    loss_seed_in_memory: "i32",
    first: "i32",  # 0, or 1 without a chain
    A: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    OF_NOISE: tl.constexpr,  # what is predicted: the noise, or the action
    BLOCK: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    of_loss = tl.program_id(1) + first
    of_chain = tl.load(seed_at, seed_in_memory != 0, seed)
    seed = tl.where(of_loss != 0, tl.load(loss_seed_at, loss_seed_in_memory != 0, loss_seed), of_chain)
    rows_forward(
        floats, operands, steps, None, data, t, q_sample, actions, errors, seed, max_action, of_loss, B, B, 1, K, T,
        A, AP, HP, L, KIND, ROWS, CHUNK, STAGES, GROUPS, HOLD, PRECISION, EDGE, False, True, 1, OF_NOISE, BF16, EMULATE,
    )  # fmt: skip
    if of_loss != 0:
        tl.debug_barrier()
        tiles = tl.num_programs(0)
        if tl.atomic_add(counter, 1) == tiles - 1:
            total = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, tiles, BLOCK):
                i = start + tl.arange(0, BLOCK)
                total += tl.load(errors + i, i < tiles, 0.0, cache_modifier=".cg")  # other multiprocessors wrote them
            tl.store(loss, tl.sum(total, axis=0) * share)


@triton.jit
def _actor_bwd(
    floats: "*fp32",  # what _actor_fwd was handed and saved
    operands: "*op",
    steps: "*fp32",
    d_actions: "*fp32 any",  # [B, A]; never read without a chain's gradient
    d_floats: "*fp32",  # written: d_eps [K + 1, RP, AP] | d_z of the first layer, of chain and loss [2, RP, HP]
    d_operands: "*op",  # written: d_z [L, K + 1, RP, HP]
    max_action: "fp32",
    weight: "fp32",  # 2 / (B A)
    B: "i32",
    K: "i32",
    T: "i32",
    first: "i32",  # 0, or 1 without a chain's gradient
    A: tl.constexpr,
    AP: tl.constexpr,
    HP: tl.constexpr,
    L: tl.constexpr,
    ROWS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    HOLD: tl.constexpr,
    PRECISION: tl.constexpr,
    EDGE: tl.constexpr,
    BF16: tl.constexpr,
    EMULATE: tl.constexpr,
):
    rows_backward(
        floats, operands, steps, d_actions, d_floats, d_operands, max_action, weight, tl.program_id(1) + first, B, B,
        K, T,
        A, AP, HP, L, ROWS, CHUNK, STAGES, GROUPS, HOLD, PRECISION, EDGE, 1, BF16, EMULATE,
    )  # fmt: skip


@dataclass(eq=False)
class ActorSaved:
    """What `ActorRunner.backward` needs of a forward pass."""

    floats: Tensor
    operands: Tensor
    rows: int  # RP
    t: Tensor
    steps: int  # K


class ActorRunner:
    """An actor's updates on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the denoiser.
        table: [T, 8], the rows of the step table of all T steps, padded with two zeros.
        embedding: [T, D], of the timesteps T - 1 .. 0.
        q_sample: [T, 2], the factors of data and noise at the timesteps 0 .. T - 1.
        max_action: bound of actions and predicted x0.
        predict_epsilon: whether the denoiser predicts the noise, and not x0.
        precision: "fp32", "tf32" or "bf16".

    Raises:
        ValueError: the tables are not of the same steps.
    """

    def __init__(
        self,
        spec: DenoiserSpec,
        table: Tensor,
        embedding: Tensor,
        q_sample: Tensor,
        max_action: float,
        predict_epsilon: bool,
        precision: str,
    ) -> None:
        T, self.device = table.size(0), table.device
        check_memory(
            self.device,
            table=(table, 8 * T),
            embedding=(embedding, T * spec.time_dim),
            q_sample=(q_sample, 2 * T),
        )
        self.spec, self.table, self.embedding, self.q_sample = spec, table, embedding, q_sample
        self.max_action, self.predict_epsilon, self.precision = max_action, predict_epsilon, precision
        # Made on the CPU: the copy waits until it is in, whatever stream reads it.
        self.steps = torch.cat([table.cpu(), torch.tensor([_NO_STEP], device="cpu")]).to(self.device)
        self.sizes = packed_sizes(spec)
        self.arch, self.processors = architecture(self.device), multiprocessors(self.device)
        self._prologue = Prologue(spec, precision, True, self.device, count=True)
        self._gradients = ChainGradients(spec, precision, self.device, loss=True)
        self.operand = torch.bfloat16 if precision == "bf16" and not INTERPRETED else torch.float32

    def forward(
        self,
        flat: Tensor,
        states: Tensor,
        actions: Tensor,
        t: Tensor,
        bc_seed: int | Tensor,
        seed: int | Tensor | None,
    ) -> tuple[Tensor, Tensor, ActorSaved]:
        """Runs the chain, and the prediction.

        Args:
            flat: parameters [P].
            states: [B, S], contiguous.
            actions: the data's [B, A], contiguous.
            t: their timesteps, int64 [B] on the device, 0 .. T - 1.
            bc_seed: of the noise on them, `dql.noise.normal(bc_seed, 1, B, A)[0]`; 0 .. 2^64 - 1, or an int64 tensor
                [1] on the device, read when the kernel runs.
            seed: of the chain's noise, likewise; None: there is no chain.

        Returns:
            (sampled actions [B, A], or [0, A] without a chain; the loss [1]; what `backward` needs).

        Raises:
            ValueError: a tensor that is not as the kernels take it; more rows than their numbers of 32 bits count.
        """
        B, A, T, s = states.size(0), self.spec.action_dim, self.table.size(0), self.sizes
        if (limit := too_many(B, T)) is not None:
            raise ValueError(f"backend 'triton': {limit}")
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            actions=(actions, B * A),
        )
        if t.shape != (B,) or t.dtype is not torch.int64 or t.device != self.device or not t.is_contiguous():
            raise ValueError(f"t must be int64 [{B}] in one piece on {self.device}, got {t.dtype} {list(t.shape)}")
        kernel = fitting(
            actor_fwd_kernel(self.spec, self.precision, self._tile("saving", B), self.predict_epsilon), self.device
        )
        tiles = cdiv(B, kernel.tile.rows)
        RP = tiles * kernel.tile.rows
        K = 0 if seed is None else T
        n_floats = s.floats + (T + B + RP) * s.HP + (2 * K + 5) * RP * s.AP
        n_operands = 2 * s.operands + 2 * s.L * (K + 1) * RP * s.HP
        floats = torch.empty(n_floats, dtype=torch.float32, device=self.device)
        operands = torch.empty(n_operands, dtype=self.operand, device=self.device)
        sampled = torch.empty(B if K else 0, A, dtype=torch.float32, device=self.device)
        loss = torch.empty(16 + tiles, dtype=torch.float32, device=self.device)  # the loss, and the tiles' parts of it
        counter = torch.empty(1, dtype=torch.int32, device=self.device)
        self._prologue.launch(flat, self.embedding, T, states, floats, operands, counter=counter)
        at, number, in_memory = seed_arguments(0 if seed is None else seed, self.device)
        bc_at, bc_number, bc_in_memory = seed_arguments(bc_seed, self.device)
        kernel.launch(
            (tiles, 1 + (K > 0), 1),
            floats, operands, self.steps[T - K :], actions, t, self.q_sample, at, bc_at, sampled, loss[16:], counter,
            loss, number, bc_number, self.max_action, 1 / (B * A), B, K, T, in_memory, bc_in_memory, int(K == 0),
        )  # fmt: skip
        return sampled, loss[:1], ActorSaved(floats, operands, RP, t, K)

    def backward(
        self, flat: Tensor, saved: ActorSaved, states: Tensor, d_sampled: Tensor | None, into: Tensor | None = None
    ) -> Tensor:
        """The gradient of the loss, plus that of the chain; the same arguments give the same bits.

        Args:
            flat: parameters [P], as they were.
            saved: what `forward` returned; it may be used again.
            states: [B, S], contiguous, as they were.
            d_sampled: of the sampled actions [B, A], contiguous; None: nothing comes from the chain.
            into: where the gradient is written [P], contiguous; None: new memory.

        Returns:
            d_flat [P], zero where no parameter lies.

        Raises:
            ValueError: a tensor that is not as the kernels take it; a gradient of a chain that was not run.
        """
        B, A, T, s, RP = states.size(0), self.spec.action_dim, self.table.size(0), self.sizes, saved.rows
        K = saved.steps
        if d_sampled is not None and K == 0:
            raise ValueError("there is a gradient of sampled actions, and none were sampled; give forward a seed")
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            d_sampled=(d_sampled, B * A),
            into=(into, self.spec.layout.size),
        )
        tile = self._tile("backward", B)
        while RP % tile.rows:
            tile = replace(tile, rows=tile.rows // 2)
        d_floats = torch.empty((K + 1) * RP * s.AP + 2 * RP * s.HP, dtype=torch.float32, device=self.device)
        d_operands = torch.empty(s.L * (K + 1) * RP * s.HP, dtype=self.operand, device=self.device)
        kernel = fitting(actor_bwd_kernel(self.spec, self.precision, tile), self.device)
        of_chain = d_sampled is not None
        kernel.launch(
            (RP // kernel.tile.rows, 1 + of_chain, 1),
            saved.floats, saved.operands, self.steps[T - K :], d_sampled if of_chain else d_floats, d_floats,
            d_operands, self.max_action, 2 / (B * A), B, K, T, int(not of_chain),
        )  # fmt: skip
        d_flat, _ = self._gradients.compute(
            flat, self.embedding, states, saved.floats, saved.operands, d_floats, d_operands, RP, B, True, False,
            saved.t, K, of_chain, into,
        )  # fmt: skip
        assert d_flat is not None
        return d_flat

    def _tile(self, kind: str, rows: int) -> Tile:
        return choose(
            self.arch, self.processors, Shape(kind, self.sizes.HP, self.precision == "bf16", rows, self.sizes.AP)
        )


@lru_cache(maxsize=256)
def actor_fwd_kernel(spec: DenoiserSpec, precision: str, tile: Tile, of_noise: bool) -> Kernel:
    """The forward kernel for a denoiser that predicts the noise or x0, a precision and a tile."""

    def smaller() -> Kernel | None:
        less = next_smaller(tile)
        return None if less is None else actor_fwd_kernel(spec, precision, less, of_noise)

    kind = ACTIVATIONS.index(spec.activation)
    most = 255 if tile.warps < 8 else None  # told so, ptxas spills of 8 warps on sm_100 where it otherwise does not
    return kernel_of_rows(_actor_fwd, spec, precision, tile, smaller, most, KIND=kind, OF_NOISE=of_noise, BLOCK=256)


@lru_cache(maxsize=256)
def actor_bwd_kernel(spec: DenoiserSpec, precision: str, tile: Tile) -> Kernel:
    """The backward kernel for a denoiser, a precision and a tile."""

    def smaller() -> Kernel | None:
        less = next_smaller(tile)
        return None if less is None else actor_bwd_kernel(spec, precision, less)

    return kernel_of_rows(_actor_bwd, spec, precision, tile, smaller)
