"""The actor's losses by the CUDA kernels: a chain over a batch's states, and beside it, in the same launches, the
noise-prediction loss of the batch. Buffers, streams and letters are those of `chain`.

The loss's B rows are rows of one more step, each with the timestep and the noise of its own; their part of the time
table is the chain's, whose step k has timestep T - 1 - k. Forward is two launches, backward three.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..layout import DenoiserSpec
from ..limits import check_memory
from .chain import Launcher, address, seed_arguments
from .plan import Problem, Tiling, choose

Tensor = torch.Tensor


@dataclass(eq=False)
class ActorSaved:
    """What `ActorRunner.backward` needs of a forward pass."""

    packed: Tensor
    saved: Tensor
    tiling: Tiling
    steps: int  # of the chain: T, or 0
    batch: tuple[Tensor, Tensor]  # whose addresses are in `cloning`
    cloning: bytes


class ActorRunner(Launcher):
    """The losses of one denoiser on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the denoiser.
        table: [T, 8], the rows of the step table of all T steps, padded with two zeros.
        embedding: [T, D], of its timesteps.
        q_sample: [T, 2], float32: sqrt(alphas_cumprod_t) and sqrt(1 - alphas_cumprod_t).
        max_action: bound of actions and predicted x0.
        predict_epsilon: whether the denoiser predicts the noise; else x0.
        precision: "fp32", "tf32" or "bf16".
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
        super().__init__(spec, precision, table.device)
        self.table, self.embedding, self.q_sample = table, embedding, q_sample
        self.max_action, self.predict_epsilon = max_action, predict_epsilon

    def forward(
        self,
        flat: Tensor,
        states: Tensor,
        actions: Tensor,
        t: Tensor,
        bc_seed: int | Tensor,
        seed: int | Tensor | None,
    ) -> tuple[Tensor, Tensor, ActorSaved]:
        """Runs the chain, and the denoiser on the batch's noisy actions.

        Args:
            flat: parameters [P].
            states: [B, S], contiguous.
            actions: [B, A], contiguous.
            t: timesteps of the loss, int64 [B], 0 .. T - 1: what they are is not looked at.
            bc_seed: of the loss's noise, normal(bc_seed, 1, B, A)[0]; a number, or int64 [1] on the device.
            seed: of the chain's, likewise; None: there is no chain.

        Returns:
            (the chain's actions [B, A], or [0, A]; the loss [1]; what `backward` wants).
        """
        spec, B, T = self.spec, states.size(0), self.table.size(0)
        K = 0 if seed is None else T
        check_memory(
            self.device,
            flat=(flat, spec.layout.size),
            states=(states, B * spec.state_dim),
            actions=(actions, B * spec.action_dim),
        )
        if t.shape != (B,) or t.dtype is not torch.int64 or t.device != self.device or not t.is_contiguous():
            raise ValueError(f"t must be int64 [{B}] in one piece on {self.device}, got {t.dtype} {list(t.shape)}")
        tiling = choose(Problem(spec, self.precision, B, T, 1, True, alone=False), self.ordinal)
        packed_bytes, saved_bytes, _, counter = self.module.actor_sizes(
            self.mlp, *tiling.numbers(self.precision), B, K, T
        )
        packed, saved = self.bytes(packed_bytes), self.bytes(saved_bytes)
        sampled, loss = self.floats(B if K else 0, spec.action_dim), self.floats(1)
        calls, stream = self.calls, self.stream
        told: dict[str, Any] = tiling.fields(self.precision)
        told |= {"transposed": 1, "B": B, "ordinal": self.ordinal, "embedding": self.embedding.data_ptr()}
        prologue = calls["prologue"].pack(
            calls["prologue"].fix(K=T, counter=saved.data_ptr() + counter, **told), flat=flat.data_ptr(),
            states=states.data_ptr(), packed=packed.data_ptr(), stream=stream,
        )  # fmt: skip
        self.module.prologue(self.mlp, prologue)
        number, number_at = seed_arguments(0 if seed is None else seed)
        chain = calls["chain"].fix(
            networks=1, steps=self.table.data_ptr(), N=1, K=K, max_action=self.max_action,
            max_clusters=self.max_clusters(tiling, False), **told,
        )  # fmt: skip
        chain = calls["chain"].pack(
            chain, flat=flat.data_ptr(), states=states.data_ptr(), packed=packed.data_ptr(), seed=number,
            seed_at=number_at, out=sampled.data_ptr(), saved=saved.data_ptr(), stream=stream,
        )  # fmt: skip
        number, number_at = seed_arguments(bc_seed)
        cloning = calls["cloning"].pack(
            calls["cloning"].fix(q_sample=self.q_sample.data_ptr(), T=T, predict_epsilon=self.predict_epsilon),
            actions=actions.data_ptr(), t=t.data_ptr(), seed=number, seed_at=number_at, loss=loss.data_ptr(),
        )  # fmt: skip
        self.module.actor_chain_forward(self.mlp, chain, cloning)
        return sampled, loss, ActorSaved(packed, saved, tiling, K, (actions, t), cloning)

    def backward(
        self, flat: Tensor, saved: ActorSaved, states: Tensor, d_sampled: Tensor | None, into: Tensor | None = None
    ) -> Tensor:
        """The gradient of the noise-prediction loss, plus that of the chain.

        Args:
            flat: parameters [P], as they were.
            saved: what `forward` returned; it may be used again.
            states: [B, S], contiguous, as they were.
            d_sampled: of the chain's actions [B, A]; None: zero.
            into: where the gradient is written [P]; None: new memory.

        Returns:
            d_flat [P], zero where no parameter lies.
        """
        spec, B, T, K = self.spec, states.size(0), self.table.size(0), saved.steps
        P = spec.layout.size
        if K and d_sampled is None:
            d_sampled = torch.zeros(B, spec.action_dim, dtype=torch.float32, device=self.device)
        check_memory(
            self.device,
            flat=(flat, P),
            states=(states, B * spec.state_dim),
            d_sampled=(d_sampled, B * spec.action_dim if K else 0),
            into=(into, P),
        )
        numbers, calls, stream = saved.tiling.numbers(self.precision), self.calls, self.stream
        back = self.bytes(self.module.actor_sizes(self.mlp, *numbers, B, K, T)[2])
        told: dict[str, Any] = saved.tiling.fields(self.precision)
        told |= {"networks": 1, "B": B, "N": 1, "K": K, "ordinal": self.ordinal}
        chain = calls["chain"].fix(
            transposed=1, steps=self.table.data_ptr(), max_action=self.max_action, d_out=address(d_sampled),
            back=back.data_ptr(), max_clusters=self.max_clusters(saved.tiling, True), **told,
        )  # fmt: skip
        chain = calls["chain"].pack(
            chain, flat=flat.data_ptr(), packed=saved.packed.data_ptr(), saved=saved.saved.data_ptr(), stream=stream
        )
        self.module.actor_chain_backward(self.mlp, chain, saved.cloning)
        parts = self.parts((K + 1) * B)
        workspace = self.floats(self.module.gradient_workspace(self.mlp, *numbers, K, parts, 1, T))
        d_flat = self.floats(P) if into is None else into
        gradients = calls["gradients"].fix(embedding=self.embedding.data_ptr(), parts=parts, **told)
        gradients = calls["gradients"].pack(
            gradients, flat=flat.data_ptr(), states=states.data_ptr(), saved=saved.saved.data_ptr(),
            back=back.data_ptr(), workspace=workspace.data_ptr(), d_flat=d_flat.data_ptr(), stream=stream,
        )  # fmt: skip
        self.module.actor_gradients(self.mlp, gradients, saved.cloning)
        return d_flat
