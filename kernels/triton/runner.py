"""Chains of one denoiser on one device: sizes and tiles worked out, buffers made, kernels launched in order.

Forward is two launches, `prologue` and `reverse_diffusion._chain_fwd`; backward is three, `_chain_bwd` and the two of
`weight_gradients`. Buffers come from torch's allocator and belong to one call: nothing is shared between streams.

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, S state size, A action size, K steps, P size
of the flat buffer.
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from ..layout import DenoiserSpec
from ..limits import check_memory, too_many
from .chain import chain_bwd_kernel, chain_fwd_kernel
from .chain_gradients import ChainGradients
from .launch import INTERPRETED, Kernel, architecture, fitting, fixed, multiprocessors
from .packing import cdiv, packed_sizes
from .prologue import Prologue
from .tiles import Shape, Tile, choose

Tensor = torch.Tensor


@dataclass(eq=False)
class ChainSaved:
    """What `ChainRunner.backward` needs of a forward pass."""

    floats: Tensor
    operands: Tensor
    rows: int  # RP


class ChainRunner:
    """Chains of one denoiser on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the denoiser.
        table: [K, 8], the rows of the step table, padded with two zeros.
        embedding: [K, D], of the timesteps.
        max_action: bound of actions and predicted x0.
        precision: "fp32", "tf32" or "bf16".
    """

    def __init__(self, spec: DenoiserSpec, table: Tensor, embedding: Tensor, max_action: float, precision: str) -> None:
        self.spec, self.table, self.embedding, self.precision = spec, table, embedding, precision
        self._fixed = fixed(table), fixed(embedding)
        self.max_action = max_action
        self.sizes = packed_sizes(spec)
        self.device = table.device
        self.arch, self.processors = architecture(self.device), multiprocessors(self.device)
        self._prologues = {save: Prologue(spec, precision, save, self.device) for save in (False, True)}
        self._gradients = ChainGradients(spec, precision, self.device)
        self.operand = torch.bfloat16 if precision == "bf16" and not INTERPRETED else torch.float32

    def forward(
        self,
        flat: Tensor,
        states: Tensor,
        candidates: int,
        noise: Tensor | None,
        seed: int | Tensor,
        save: bool,
        told: Tensor | None = None,
    ) -> tuple[Tensor, ChainSaved | None]:
        """Runs the chain.

        Args:
            flat: parameters [P].
            states: [B, S], contiguous.
            candidates: N.
            noise: [K, R, A], contiguous, or None: then the seed's stream.
            seed: 0 .. 2^64 - 1; or an int64 tensor [1] on the device, read when the kernel runs.
            save: keep what `backward` needs.
            told: int32 [1], on the device or in pinned memory, set to 1 if a state holds NaN or infinity; or None.
                Such a state's actions are NaN.

        Returns:
            (actions [R, A], saved or None).
        """
        spec, B, K = self.spec, states.size(0), self.table.size(0)
        R = B * candidates
        check_memory(
            self.device,
            flat=(flat, spec.layout.size),
            states=(states, B * spec.state_dim),
            noise=(noise, K * R * spec.action_dim),
        )
        plan = self.plan(B, candidates, noise is not None, save)
        actions = torch.empty(R, spec.action_dim, dtype=torch.float32, device=self.device)
        buffer = plan.run(flat, states, noise, seed, actions, told)
        return actions, ChainSaved(*plan.parts(buffer), plan.rows) if save else None

    def plan(self, B: int, candidates: int = 1, noise: bool = False, save: bool = False) -> "ChainPlan":
        """Everything about a forward pass that its tensors do not change.

        Raises:
            ValueError: more rows or steps than the kernels' numbers of 32 bits count, which Triton looks at no more.
        """
        K, s, R = self.table.size(0), self.sizes, B * candidates
        if (limit := too_many(R, K)) is not None:
            raise ValueError(f"backend 'triton': {limit}")
        chosen = self._tile("saving" if save else "forward", R)
        kernel = fitting(chain_fwd_kernel(self.spec, self.precision, chosen, noise, save), self.device)
        tile: Tile = kernel.tile
        tiles = cdiv(R, tile.rows)
        RP = tiles * tile.rows
        n_floats = s.floats + (K + B) * s.HP + (2 * K + 1 if save else 1) * RP * s.AP
        n_operands = s.operands * (1 + save) + s.HP * (2 * s.L * K * RP if save else 2 * RP)
        return ChainPlan(self, self._prologues[save], kernel, tiles, RP, n_floats, n_operands, (R, B, candidates, K))

    def _tile(self, kind: str, rows: int) -> Tile:
        return choose(
            self.arch, self.processors, Shape(kind, self.sizes.HP, self.precision == "bf16", rows, self.sizes.AP)
        )

    def backward(
        self,
        flat: Tensor,
        saved: ChainSaved,
        states: Tensor,
        d_actions: Tensor,
        need_parameters: bool,
        need_states: bool,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradient of `forward`.

        Args:
            flat: parameters [P], as they were.
            saved: what `forward` returned; it may be used again.
            states: [B, S], contiguous.
            d_actions: [R, A], contiguous.
            need_parameters: compute d_flat.
            need_states: compute d_states.

        Returns:
            (d_flat [P], d_states [B, S]), None where not needed. Where no parameter lies, d_flat is zero.
        """
        B, R, K, s, RP = states.size(0), d_actions.size(0), self.table.size(0), self.sizes, saved.rows
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            d_actions=(d_actions, R * self.spec.action_dim),
        )
        tile = self._tile("backward", R)
        while RP % tile.rows:
            tile = replace(tile, rows=tile.rows // 2)
        d_floats = torch.empty(K * RP * s.AP + RP * s.HP, dtype=torch.float32, device=self.device)
        d_operands = torch.empty(s.L * K * RP * s.HP, dtype=self.operand, device=self.device)
        kernel = fitting(chain_bwd_kernel(self.spec, self.precision, tile), self.device)
        kernel.launch(
            (RP // kernel.tile.rows, 1, 1),
            saved.floats, saved.operands, self.table, d_actions, d_floats, d_operands, self.max_action, R, B, K,
        )  # fmt: skip
        return self._gradients.compute(
            flat, self.embedding, states, saved.floats, saved.operands, d_floats, d_operands, RP, R,
            need_parameters, need_states,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class ChainPlan:
    """A forward pass of fixed size, ready to be run on any tensors of that size."""

    runner: ChainRunner
    prologue: Prologue
    kernel: Kernel
    tiles: int
    rows: int  # RP
    n_floats: int
    n_operands: int
    sizes: tuple[int, int, int, int]  # R, B, N, K

    def run(
        self,
        flat: Tensor,
        states: Tensor,
        noise: Tensor | None,
        seed: int | Tensor,
        actions: Tensor,
        told: Tensor | None = None,
    ) -> Tensor:
        """Fills actions [R, A]; the other arguments are those of `ChainRunner.forward`. Returns what holds `parts`."""
        runner = self.runner
        # One tensor, not two, and addresses, not views of it: each of them would cost the host its time.
        buffer = flat.new_empty(self.n_floats + self.n_operands * runner.operand.itemsize // 4)
        floats: Tensor | int
        operands: Tensor | int
        if INTERPRETED:
            floats, operands = self.parts(buffer)
        else:
            floats = buffer.data_ptr()
            operands = floats + 4 * self.n_floats
        table, embedding = runner._fixed
        self.prologue.launch(flat, embedding, self.sizes[3], states, floats, operands, told)
        at, number, in_memory = seed_arguments(seed, runner.device)
        self.kernel.launch(
            (self.tiles, 1, 1),
            floats, operands, table, noise, at, actions, number, runner.max_action, *self.sizes, in_memory,
        )  # fmt: skip
        return buffer

    def parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """(floats, operands) in the buffer: its sizes are multiples of 16, so that both are aligned."""
        return buffer[: self.n_floats], buffer[self.n_floats :].view(self.runner.operand)


def seed_arguments(seed: int | Tensor, device: torch.device) -> tuple[Tensor | int, int, int]:
    """What kernels are told of a seed: (where it is, or anything; its bits as a signed number; whether it is there)."""
    if isinstance(seed, Tensor):
        return seed, 0, 1
    return _nowhere(device), seed - (1 << 64) if seed >> 63 else seed, 0


@lru_cache(maxsize=64)
def _nowhere(device: torch.device) -> Tensor | int:
    """Never read. Where kernels are compiled it is no memory at all."""
    return torch.empty(1, dtype=torch.int64, device=device) if INTERPRETED else 0
