"""What `dql.select` draws among: the index of a candidate, and all that can be told of the draw."""

from dataclasses import dataclass, fields

import torch

from dql import noise
from dql.backend.base import Backend
from dql.networks import TwinCritic
from dql.values import q_values

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Selection:
    """What `dql.select(..., details=True)` chose, and what it chose from; no gradient flows.

    `q1` and `q2` are of the policy's dtype whatever the `precision`; "cuda" and "triton" weigh the candidates with
    values of that precision. How far q1 and q2 lie apart, and how far the candidates spread, are hints and no more:
    docs/training.md, "How sure is it?".

    Attributes:
        actions: the chosen actions [B, A], as without `details`.
        q1: Q_1 of them [B]; of a critic that has become NaN, NaN.
        q2: Q_2 of them [B].
        index: which of the N candidates they are, int64 [B]. Another backend takes another only where the draw falls
            within rounding of the border of two: of 400,000 with N = 8 in "fp32", "cpp" drew 2 other than "eager".
        spread: standard deviation of the N candidates in every dimension of the action [B, A]: of the population, that
            is divided by N, so it is 0 with one candidate.
    """

    actions: Tensor
    q1: Tensor
    q2: Tensor
    index: Tensor
    spread: Tensor

    def __repr__(self) -> str:
        shapes = ", ".join(f"{field.name} {list(getattr(self, field.name).shape)}" for field in fields(self))
        return f"Selection({shapes}, device={self.actions.device})"

    @classmethod
    def of_none(cls, states: Tensor, action_dim: int) -> "Selection":
        """That of no states [0, S]."""
        none = states.new_zeros(0)
        actions, spread = states.new_zeros(0, action_dim), states.new_zeros(0, action_dim)
        return cls(actions, none, none.clone(), none.to(torch.int64), spread)

    @classmethod
    def of(
        cls, critic: TwinCritic, states: Tensor, candidates: Tensor, index: Tensor, actions: Tensor, backend: Backend
    ) -> "Selection":
        """That of candidates [B, N, A], of which those at `index` are the actions. Waits for no GPU."""
        with torch.autocast(states.device.type, enabled=False):  # what the values are does not hang on who asks
            q1, q2 = q_values(critic, states, actions, backend)
        return cls(actions, q1, q2, index, candidates.std(dim=1, correction=0))


def drawn_index(critic: TwinCritic, states: Tensor, candidates: Tensor, seed: int | Tensor) -> Tensor:
    """Which of the candidates [B, N, A] each state takes, int64 [B]: the acting rule in torch."""
    cumulative = critic.q_min(states, candidates).softmax(dim=1).cumsum(dim=1)  # [B, N]
    draw = noise.uniform(seed, states.shape[0]).to(cumulative, non_blocking=True)[:, None]
    return (cumulative <= draw * cumulative[:, -1:]).sum(dim=1).clamp_(max=candidates.shape[1] - 1)
