"""Twin critics by the CUDA kernels, their gradient, and the draw of `select` from their values.

A critic is a chain of one step: the same kernels run it, both networks side by side. Buffers, streams and letters are
those of `cuda_chain`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..layout import CriticSpec
from ..limits import check_memory
from . import binding
from .chain import Launcher, address, current_stream, seed_arguments
from .plan import Tiling

Tensor = torch.Tensor


@dataclass(eq=False)
class CriticSaved:
    """What `CriticRunner.backward` needs of a forward pass."""

    packed: Tensor
    saved: Tensor
    tiling: Tiling
    which: tuple[int, ...]


class CriticRunner(Launcher):
    """Twin critics of one size on one device in one precision; made once and kept, it holds no parameters.

    Args:
        spec: sizes of the critics.
        precision: "fp32", "tf32" or "bf16"; the first and the last layer are float32 in all of them.
        device: where the tensors are.
    """

    def __init__(self, spec: CriticSpec, precision: str, device: torch.device) -> None:
        super().__init__(spec, precision, device)

    def forward(
        self, flat: Tensor, states: Tensor, actions: Tensor, candidates: int, which: tuple[int, ...], save: bool
    ) -> tuple[Tensor, CriticSaved | None]:
        """The Q values of the critics that `which` names.

        Args:
            flat: parameters of both critics [P].
            states: [B, S], contiguous.
            actions: [R, A], contiguous; row b * N + n is candidate n of state b.
            candidates: N.
            which: (0, 1), (0,) or (1,).
            save: keep what `backward` needs.

        Returns:
            (q [len(which), R], saved or None).

        Raises:
            ValueError: `which` is none of the three.
        """
        if which not in ((0, 1), (0,), (1,)):
            raise ValueError(f"which must be (0, 1), (0,) or (1,), the critics to run, got {which!r}")
        B, n, stream, calls = states.size(0), len(which), self.stream, self.calls
        R = B * candidates
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            actions=(actions, R * self.spec.action_dim),
        )
        tiling = self.tiling(R, 1, n, save)
        numbers = tiling.numbers(self.precision)
        packed_bytes, saved_bytes, _, _, _ = self.module.sizes(self.mlp, *numbers, B, R, 1, int(save), n)
        packed, q = self.bytes(packed_bytes), self.floats(n, R)
        saved = self.bytes(saved_bytes) if save else None
        told: dict[str, Any] = tiling.fields(self.precision)
        told |= {"transposed": save, "B": B, "K": 1, "ordinal": self.ordinal}
        prologue = calls["prologue"].pack(
            calls["prologue"].fix(**told), flat=flat.data_ptr(), states=states.data_ptr(), packed=packed.data_ptr(),
            stream=stream,
        )  # fmt: skip
        self.module.prologue(self.mlp, prologue)
        chain = calls["chain"].fix(
            first_network=which[0], networks=n, N=candidates, actions_in=actions.data_ptr(),
            max_clusters=self.max_clusters(tiling, False), **told,
        )  # fmt: skip
        chain = calls["chain"].pack(
            chain, flat=flat.data_ptr(), packed=packed.data_ptr(), out=q.data_ptr(), saved=address(saved), stream=stream
        )
        self.module.chain_forward(self.mlp, chain)
        return q, CriticSaved(packed, saved, tiling, which) if saved is not None else None

    def backward(
        self,
        flat: Tensor,
        saved: CriticSaved,
        states: Tensor,
        actions: Tensor,
        d_q: Tensor,
        need_parameters: bool,
        need_states: bool,
        need_actions: bool,
        only: int | Tensor | None = None,
        into: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradient of `forward`; the same arguments give the same bits.

        Args:
            flat: parameters [P], as they were.
            saved: what `forward` returned; it may be used again.
            states: [B, S], contiguous, as they were.
            actions: [R, A], contiguous, as they were.
            d_q: [len(which), R], contiguous.
            need_parameters: compute d_flat.
            need_states: compute d_states.
            need_actions: compute d_actions.
            only: of both critics the one, 1 or 2, whose d_q is not zero; or float32 [2] on the device with a 1 for it
                and a 0. The other is left out. For d_actions alone.
            into: where d_flat is written [P]; None: new memory.

        Returns:
            (d_flat [P], d_states [B, S], d_actions [R, A]), None where not needed. Where no parameter lies, or one of
            a critic that was not run, d_flat is zero.
        """
        if not (need_parameters or need_states or need_actions):
            return None, None, None
        (n, R), B, stream, calls = d_q.shape, states.size(0), self.stream, self.calls
        check_memory(
            self.device,
            flat=(flat, self.spec.layout.size),
            states=(states, B * self.spec.state_dim),
            actions=(actions, R * self.spec.action_dim),
            d_q=(d_q, len(saved.which) * R),
        )
        numbers, first = saved.tiling.numbers(self.precision), saved.which[0]
        back = self.bytes(self.module.sizes(self.mlp, *numbers, B, R, 1, 1, n)[2])
        one = n if only is None else 1  # networks of which there is a gradient of the actions
        each_actions = self.floats(one, R, self.spec.action_dim) if need_actions else None
        only_at = only if isinstance(only, Tensor) else None
        check_memory(self.device, only=(only_at, 2), into=(into, self.spec.layout.size))
        told: dict[str, Any] = saved.tiling.fields(self.precision)
        told |= {"first_network": first, "networks": n, "B": B, "N": R // B, "K": 1, "ordinal": self.ordinal}
        chain = calls["chain"].fix(
            transposed=1, d_out=d_q.data_ptr(), back=back.data_ptr(), d_actions=address(each_actions),
            only_at=address(only_at), only=only if isinstance(only, int) else 0,
            max_clusters=self.max_clusters(saved.tiling, True), **told,
        )  # fmt: skip
        chain = calls["chain"].pack(
            chain, flat=flat.data_ptr(), packed=saved.packed.data_ptr(), saved=saved.saved.data_ptr(), stream=stream
        )
        self.module.chain_backward(self.mlp, chain)
        d_flat = None if not need_parameters else self.floats(self.spec.layout.size) if into is None else into
        d_states = torch.empty_like(states) if need_states else None
        if need_parameters or need_states:
            parts = self.parts(R)
            workspace = self.floats(
                self.module.gradient_workspace(self.mlp, *numbers, 1, parts, int(need_parameters), 0),
            )
            gradients = calls["gradients"].pack(
                calls["gradients"].fix(parts=parts, **told), flat=flat.data_ptr(), states=states.data_ptr(),
                saved=saved.saved.data_ptr(), back=back.data_ptr(), actions_in=actions.data_ptr(), d_q=d_q.data_ptr(),
                workspace=workspace.data_ptr(), d_flat=address(d_flat), d_states=address(d_states), stream=stream,
            )  # fmt: skip
            self.module.gradients(self.mlp, gradients)
        d_actions = None if each_actions is None else each_actions[0] if one == 1 else each_actions.sum(0)
        return d_flat, d_states, d_actions


def choose(q: Tensor, actions: Tensor, candidates: int, draw_seed: int | Tensor) -> Tensor:
    """Draws a candidate a state from softmax(min(Q_1, Q_2)): the first whose cumulative probability exceeds
    `dql.noise.uniform(draw_seed)`; of a critic that has become NaN, the first.

    Args:
        q: [2, R], contiguous, row b * N + n being candidate n of state b.
        actions: [R, A], contiguous.
        candidates: N.
        draw_seed: 0 .. 2^64 - 1, or an int64 tensor [1] on the device, read when the kernel runs.

    Returns:
        [B, A].
    """
    R, A = actions.shape
    B = R // candidates
    chosen = torch.empty(B, A, dtype=torch.float32, device=actions.device)
    call, (number, number_at) = binding.calls(binding.emulating())["choose"], seed_arguments(draw_seed)
    packed = call.pack(
        call.fix(B=B, N=candidates, A=A, ordinal=chosen.device.index or 0), q=q.data_ptr(), actions=actions.data_ptr(),
        seed=number, seed_at=number_at, chosen=chosen.data_ptr(), stream=current_stream(chosen.device),
    )  # fmt: skip
    binding.module().choose(packed)
    return chosen
