"""What an update does beside chains and critics: its batch and draws, both losses of Q values with their gradients, a
step of Adam.

Each is one launch, Adam's two; buffers and streams are those of `chain`.
"""

from collections.abc import Sequence

import torch

from .. import beginning
from ..limits import check_memory
from . import binding
from .chain import address, current_stream

Tensor = torch.Tensor
_MOST_SUMS = 256  # csrc/cuda/host.h


class Beginning(beginning.Beginning):
    """By a kernel of its own, whose fixed arguments are those of the source before."""

    def __init__(self, batch: Sequence[Tensor], t: Tensor, seeds: Tensor, scalars: Tensor, T: int) -> None:
        super().__init__(batch, t, seeds, scalars, T)
        self._of_last: tuple[tuple[int, ...], bytes] | None = None

    def _launch(
        self,
        source: Sequence[Tensor],
        size: int,
        rows: tuple[int, int],
        seeds: Sequence[int],
        lr_scale: float,
        ema: float,
    ) -> None:
        call = binding.calls(binding.emulating())["begin"]
        key = (*(tensor.data_ptr() for tensor in source), size)
        if self._of_last is None or self._of_last[0] != key:
            self._of_last = (key, self._fixed(call, key))
        target, bc_noise, actor, bc_t, coin = seeds
        moving = call.move(*rows, bc_t, coin, target, bc_noise, actor, lr_scale, ema, current_stream(self.device))
        binding.module().begin(moving + self._of_last[1])

    def _fixed(self, call: binding.Call, source: tuple[int, ...]) -> bytes:
        B, S, A = self.sizes
        names = ("states", "actions", "rewards", "next_states", "masks")
        to = ("to_states", "to_actions", "to_rewards", "to_next_states", "to_masks", "t", "seeds", "scalars")
        addresses = dict(zip((*names, "size"), source, strict=True))
        addresses |= dict(zip(to, (tensor.data_ptr() for tensor in self.held), strict=True))
        return call.fix(B=B, S=S, A=A, T=self.T, ordinal=self.device.index or 0, **addresses)


def critic_loss(
    q_target: Tensor, rewards: Tensor, masks: Tensor, q: Tensor, discount: float, candidates: int
) -> tuple[Tensor, Tensor]:
    """mean (Q_1 - y)^2 + mean (Q_2 - y)^2 for y = r + mask * discount * min_i max_n Q_i'.

    Args:
        q_target: [2, B * N], contiguous, row b * N + n being candidate n of state b.
        rewards: [B].
        masks: [B].
        q: [2, B], contiguous.
        discount: of the rewards.
        candidates: N.

    Returns:
        (d_q [2, B], metrics [3]: the loss, the mean of both Q, the mean of y).
    """
    B, device = rewards.size(0), q.device
    check_memory(device, q_target=(q_target, 2 * B * candidates), rewards=(rewards, B), masks=(masks, B), q=(q, 2 * B))
    d_q, metrics = torch.empty_like(q), torch.empty(3, dtype=torch.float32, device=device)
    call = binding.calls(binding.emulating())["critic_loss"]
    fixed = call.fix(B=B, N=candidates, discount=discount, ordinal=device.index or 0)
    binding.module().critic_loss(
        call.pack(
            fixed, q_target=q_target.data_ptr(), rewards=rewards.data_ptr(), masks=masks.data_ptr(), q=q.data_ptr(),
            d_q=d_q.data_ptr(), metrics=metrics.data_ptr(), stream=current_stream(device),
        )
    )  # fmt: skip
    return d_q, metrics


def q_loss(q: Tensor, maximised: int | Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """-mean(Q_i) / mean|Q_j|, without a gradient through the divisor.

    Args:
        q: [2, B], contiguous.
        maximised: i, 1 or 2, j being the other; or float32 [2] on the device with a 1 for it and a 0.
        eta: by which the gradient is multiplied.

    Returns:
        (d_q [2, B] of eta times the loss, the loss [1]).
    """
    B, device = q.size(1), q.device
    at, picked = (maximised, 0) if isinstance(maximised, Tensor) else (None, maximised - 1)
    check_memory(device, q=(q, 2 * B), maximised=(at, 2))
    d_q, loss = torch.empty_like(q), torch.empty(1, dtype=torch.float32, device=device)
    call = binding.calls(binding.emulating())["q_loss"]
    fixed = call.fix(B=B, picked=picked, eta=eta, ordinal=device.index or 0)
    binding.module().q_loss(
        call.pack(
            fixed, q=q.data_ptr(), picked_at=address(at), d_q=d_q.data_ptr(), loss=loss.data_ptr(),
            stream=current_stream(device),
        )
    )  # fmt: skip
    return d_q, loss


def adam(
    flat: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    lr: float,
    lr_scale: float | Tensor,
    max_norm: float,
    average: tuple[Tensor, float | Tensor] | None = None,
) -> Tensor:
    """A step of torch.optim.Adam (betas 0.9 and 0.999, eps 1e-8), and of an average towards what comes of it.

    Args:
        flat: parameters [P], changed.
        gradient: [P]; left as it was clipped.
        exp_avg: [P], changed.
        exp_avg_sq: [P], changed.
        step: float32, of one number on the device, changed: steps done.
        lr: the learning rate.
        lr_scale: its factor, which may be float32, of one number on the device.
        max_norm: the gradient is scaled down to this norm if it has a larger one; 0: it is not.
        average: (a [P], weight): a goes so far towards the parameters; a weight of 0 leaves it alone. The weight may be
            float32, of one number on the device.

    Returns:
        the gradient's norm before clipping [1].
    """
    P, device = flat.numel(), flat.device
    scale_at = lr_scale if isinstance(lr_scale, Tensor) else None
    a, weight = (None, 0.0) if average is None else average
    weight_at = weight if isinstance(weight, Tensor) else None
    check_memory(
        device, flat=(flat, P), gradient=(gradient, P), exp_avg=(exp_avg, P), exp_avg_sq=(exp_avg_sq, P),
        step=(step, 1), lr_scale=(scale_at, 1), average=(a, P), weight=(weight_at, 1),
    )  # fmt: skip
    made = torch.empty(1 + _MOST_SUMS, dtype=torch.float32, device=device)
    norm, sums = made[:1], made[1:]
    call = binding.calls(binding.emulating())["adam"]
    fixed = call.fix(
        count=P, lr=lr if isinstance(lr_scale, Tensor) else lr * lr_scale, max_norm=max_norm,
        weight=0.0 if isinstance(weight, Tensor) else weight, ordinal=device.index or 0,
    )  # fmt: skip
    binding.module().adam(
        call.pack(
            fixed, flat=flat.data_ptr(), gradient=gradient.data_ptr(), exp_avg=exp_avg.data_ptr(),
            exp_avg_sq=exp_avg_sq.data_ptr(), step=step.data_ptr(), lr_scale_at=address(scale_at), average=address(a),
            weight_at=address(weight_at), sums=sums.data_ptr(), norm=norm.data_ptr(), stream=current_stream(device),
        )
    )  # fmt: skip
    return norm
