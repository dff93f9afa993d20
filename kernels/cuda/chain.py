"""Chains of one denoiser by the CUDA kernels: sizes and tilings worked out, buffers made, kernels launched in order.

Forward is two launches, the prologue and the chain; backward is three, the chain's and the two of gradients. Buffers
come from torch's allocator and belong to one call, launches go to torch's current stream, nothing waits for the device.

Letters: B states, N candidates, R = B * N rows, RP those in whole tiles, S state size, A action size, K steps, P size
of the flat buffer.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..layout import CriticSpec, DenoiserSpec
from ..limits import check_memory
from . import binding
from .plan import Problem, Tiling, choose, exchanges_whole_tiles

Tensor = torch.Tensor
_MAX_PARTS = 16  # into which the rows of a gradient are cut
_ROWS_A_PART = 128  # at least


@dataclass(eq=False)
class ChainSaved:
    """What `ChainRunner.backward` needs of a forward pass."""

    packed: Tensor
    saved: Tensor
    tiling: Tiling


class Launcher:
    """What runners of chains and of critics share: the extension, a network as it sees it, a device."""

    def __init__(self, spec: DenoiserSpec | CriticSpec, precision: str, device: torch.device) -> None:
        self.spec, self.precision, self.device = spec, precision, device
        self.emulated = binding.emulating()
        self.module = binding.load(self.emulated)
        self.mlp = binding.mlp(spec, self.emulated)
        self.calls = binding.calls(self.emulated)
        self.ordinal = device.index or 0
        self._clusters: dict[tuple[Tiling, bool], int] = {}

    @cached_property
    def nothing(self) -> Tensor:
        """What takes the place of packed weights where there are none."""
        return self.bytes(0)

    @cached_property
    def multiprocessors(self) -> int:
        return binding.facts(self.ordinal, self.emulated)[1]

    @property
    def stream(self) -> int:
        return current_stream(self.device)

    def tiling(self, rows: int, steps: int, networks: int, saving: bool) -> Tiling:
        return choose(Problem(self.spec, self.precision, rows, steps, networks, saving), self.ordinal)

    def max_clusters(self, tiling: Tiling, backward: bool) -> int:
        """How many clusters of such blocks the device holds at a time: asked for once."""
        key = (tiling, backward)
        if key not in self._clusters:
            numbers = tiling.numbers(self.precision)
            self._clusters[key] = self.module.max_clusters(self.ordinal, self.mlp, *numbers, int(backward))
        return self._clusters[key]

    def bytes(self, count: int) -> Tensor:
        """Memory for the kernels, uninitialised."""
        return torch.empty(count, dtype=torch.uint8, device=self.device)

    def floats(self, *shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=self.device)

    def parts(self, rows: int) -> int:
        """Into how many parts the rows of the weights' gradients are cut: enough for every multiprocessor."""
        side = -(-self.spec.hidden_dim // 64)
        tiles = (self.spec.num_hidden - 1) * side * side
        return max(1, min(-(-2 * self.multiprocessors // tiles), rows // _ROWS_A_PART, _MAX_PARTS))


class ChainRunner(Launcher):
    """Chains of one denoiser on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the denoiser.
        table: [K, 8], the rows of the step table, padded with two zeros.
        embedding: [K, D], of the timesteps.
        max_action: bound of actions and predicted x0.
        precision: "fp32", "tf32" or "bf16".
    """

    def __init__(self, spec: DenoiserSpec, table: Tensor, embedding: Tensor, max_action: float, precision: str) -> None:
        super().__init__(spec, precision, table.device)
        self.table, self.embedding, self.max_action = table, embedding, max_action

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
        plan = self.plan(B, candidates, save)
        actions = self.floats(R, spec.action_dim)
        saved = plan.run(flat, states, noise, seed, actions, told)
        return actions, saved

    def plan(self, B: int, candidates: int = 1, save: bool = False) -> "ChainPlan":
        """Everything about a forward pass that its tensors do not change."""
        K, R = self.table.size(0), B * candidates
        tiling = self.tiling(R, K, 1, save)
        numbers = tiling.numbers(self.precision)
        packed, saved, _, _, _ = self.module.sizes(self.mlp, *numbers, B, R, K, int(save), 1)
        told: dict[str, Any] = tiling.fields(self.precision)
        told |= {"transposed": save, "B": B, "K": K, "ordinal": self.ordinal, "embedding": self.embedding.data_ptr()}
        prologue = self.calls["prologue"].fix(**told)
        chain = self.calls["chain"].fix(
            networks=1, steps=self.table.data_ptr(), N=candidates, max_action=self.max_action,
            max_clusters=self.max_clusters(tiling, False), all_rows=exchanges_whole_tiles(), **told,
        )  # fmt: skip
        return ChainPlan(self, tiling, packed, saved if save else 0, prologue, chain)

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
        B, R, K = states.size(0), d_actions.size(0), self.table.size(0)
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            d_actions=(d_actions, R * self.spec.action_dim),
        )
        numbers, calls, stream = saved.tiling.numbers(self.precision), self.calls, self.stream
        told: dict[str, Any] = saved.tiling.fields(self.precision)
        told |= {"networks": 1, "B": B, "N": R // B, "K": K, "ordinal": self.ordinal}
        back = self.bytes(self.module.sizes(self.mlp, *numbers, B, R, K, 1, 1)[2])
        chain = calls["chain"].fix(
            transposed=1, steps=self.table.data_ptr(), max_action=self.max_action, d_out=d_actions.data_ptr(),
            back=back.data_ptr(), max_clusters=self.max_clusters(saved.tiling, True), **told,
        )  # fmt: skip
        self.module.chain_backward(
            self.mlp,
            calls["chain"].pack(
                chain, flat=flat.data_ptr(), packed=saved.packed.data_ptr(), saved=saved.saved.data_ptr(), stream=stream
            ),
        )
        parts = self.parts(K * R)
        d_flat = self.floats(self.spec.layout.size) if need_parameters else None
        d_states = torch.empty_like(states) if need_states else None
        workspace = self.floats(
            self.module.gradient_workspace(self.mlp, *numbers, K, parts, int(need_parameters), 0),
        )
        gradients = calls["gradients"].fix(embedding=self.embedding.data_ptr(), parts=parts, **told)
        self.module.gradients(
            self.mlp,
            calls["gradients"].pack(
                gradients, flat=flat.data_ptr(), states=states.data_ptr(), saved=saved.saved.data_ptr(),
                back=back.data_ptr(), workspace=workspace.data_ptr(), d_flat=address(d_flat),
                d_states=address(d_states), stream=stream,
            ),
        )  # fmt: skip
        return d_flat, d_states


@dataclass(frozen=True, eq=False)
class ChainPlan:
    """A forward pass of fixed size, ready to be run on any tensors of that size."""

    runner: ChainRunner
    tiling: Tiling
    packed_bytes: int
    saved_bytes: int  # 0: nothing is saved
    prologue: bytes  # of what the two launches are told, all that the tensors do not change
    chain: bytes

    def run(
        self,
        flat: Tensor,
        states: Tensor,
        noise: Tensor | None,
        seed: int | Tensor,
        actions: Tensor,
        told: Tensor | None = None,
    ) -> ChainSaved | None:
        """Fills actions [R, A]; the other arguments are those of `ChainRunner.forward`."""
        runner, calls = self.runner, self.runner.calls
        module, stream, at = runner.module, runner.stream, flat.data_ptr()
        packed = runner.bytes(self.packed_bytes) if self.packed_bytes else runner.nothing
        saved = runner.bytes(self.saved_bytes) if self.saved_bytes else None
        base, (number, number_at) = packed.data_ptr(), seed_arguments(seed)
        # in the order of csrc/cuda/calls.h, without names, which would cost a microsecond
        of_states, told_at = states.data_ptr(), address(told)
        if not self.tiling.solo:  # whose blocks read parameters and states themselves
            moving = calls["prologue"].move(at, of_states, base, told_at, stream)
            module.prologue(runner.mlp, moving + self.prologue)
        moving = calls["chain"].move(
            at, of_states, base, address(noise), number, number_at, actions.data_ptr(), address(saved), told_at, stream
        )
        module.chain_forward(runner.mlp, moving + self.chain)
        return ChainSaved(packed, saved, self.tiling) if saved is not None else None


def current_stream(device: torch.device) -> int:
    """torch's, on a tensor's device, which has an index."""
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def address(tensor: Tensor | None) -> int:
    """Of its memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def seed_arguments(seed: int | Tensor) -> tuple[int, int]:
    """What kernels are told of a seed: (the number, or where it is)."""
    return (0, seed.data_ptr()) if isinstance(seed, Tensor) else (seed, 0)


def normal(seed: int | Tensor, K: int, R: int, A: int, device: torch.device) -> Tensor:
    """Standard normals [K, R, A], element (k, row, dim) of the seed's stream."""
    out = torch.empty(K, R, A, dtype=torch.float32, device=device)
    if out.numel():
        call, (number, number_at) = binding.calls(binding.emulating())["noise"], seed_arguments(seed)
        fixed = call.fix(K=K, R=R, A=A, ordinal=out.device.index or 0)
        stream = current_stream(out.device)
        binding.module().noise(call.pack(fixed, seed=number, seed_at=number_at, out=out.data_ptr(), stream=stream))
    return out
