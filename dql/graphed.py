"""Repeated small calls on a GPU, recorded once as a CUDA graph: a replay costs the host one call."""

import torch

from dql import finite
from dql.kernels.capture import prove, recorded
from dql.networks import TwinCritic
from dql.policy import DiffusionPolicy
from dql.sampler import check_states_fit, checked_table, sample, select
from dql.schedule import StepTable
from dql.shown import shown

Tensor = torch.Tensor


class GraphedSampler:
    """`dql.sample` (with a critic `dql.select`) for batches of one size, replayed as a CUDA graph, without gradients.

    One sampler serves one stream at a time. Each replay draws anew from torch's generator of that GPU
    (`torch.cuda.manual_seed` makes replays repeat) and reads the parameters as they are then. As in
    `dql.sample` nothing waits for the GPU: "cuda" and "triton" make the actions of states that hold NaN or infinity
    NaN, and a later call raises, a replay or another; `dql.check_states()` waits, and then is certain. "eager" does not
    look.

    Args:
        policy: on a GPU.
        batch_size: B.
        critic: chooses one of the candidates, see `dql.select`; None samples.
        num_candidates: N; with a critic None means the published 50.
        backend, sampler, num_steps, precision: as in `dql.sample`.

    Attributes:
        states: [B, S], what the graph reads; write into it and call `replay`, or call `run`.
        actions: [B, A] (with candidates and no critic [B, N, A]), what it writes; the next replay writes over it.

    Raises:
        ValueError: the policy is not on a GPU, or an argument does not fit it.
        BackendUnavailable: the backend cannot run this here.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        batch_size: int = 1,
        *,
        critic: TwinCritic | None = None,
        num_candidates: int | None = None,
        backend: str = "auto",
        sampler: str | StepTable = "ddpm",
        num_steps: int | None = None,
        precision: str = "fp32",
    ) -> None:
        if policy.device.type != "cuda":
            raise ValueError(f"a CUDA graph needs the policy on a GPU, it is on {policy.device}; use policy.to('cuda')")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a positive integer, got {shown(batch_size)}")
        self.policy, self.critic = policy, critic
        device, table = policy.device, checked_table(policy, sampler, num_steps)
        with torch.inference_mode(False):
            self.states = torch.zeros(batch_size, policy.state_dim, dtype=policy.dtype, device=device)

        def call() -> Tensor:
            if critic is None:
                return sample(
                    self.states,
                    policy,
                    backend=backend,
                    num_candidates=num_candidates,
                    sampler=table,
                    precision=precision,
                )
            return select(
                self.states,
                policy,
                critic,
                num_candidates=50 if num_candidates is None else num_candidates,
                backend=backend,
                sampler=table,
                precision=precision,
            )

        with torch.cuda.device(device), torch.no_grad():
            self._graph, self.actions = recorded(call)
            prove(self._graph.replay, [self.actions])
        # The graph reads their memory: it must stay theirs as long as the graph lives.
        owners = [policy.denoiser] if critic is None else [policy.denoiser, critic]
        self._buffers = [(owner, owner.buffer) for owner in owners]
        self._held = (table, *(dict(owner.kept) for owner in owners), dict(table.kept), dict(policy.kept))

    def run(self, states: Tensor) -> Tensor:
        """Copies states [B, S] into the graph's and replays it.

        Returns:
            `self.actions`: clone it to keep it over the next call.

        Raises:
            ValueError: states of another shape, dtype or device than the graph's; those of an earlier call on this GPU
                held NaN or infinity, see `dql.sample`.
            RuntimeError: the policy or the critic was moved or cast since.
        """
        check_states_fit(states, self.policy)
        if states.shape[0] != self.states.shape[0]:
            raise ValueError(
                f"states are {list(states.shape)}, this graph was recorded for {list(self.states.shape)}; make another "
                "GraphedSampler for another batch size"
            )
        self.states.copy_(states)
        return self.replay()

    def replay(self) -> Tensor:
        """Runs the graph on what `self.states` holds; returns `self.actions`.

        Raises:
            ValueError: the states of an earlier call on this GPU held NaN or infinity, see `dql.sample`; this one was
                not run.
            RuntimeError: the policy or the critic was moved or cast since.
        """
        finite.raise_if_set(self.states.device)
        for owner, buffer in self._buffers:
            if owner.buffer is not buffer:
                raise RuntimeError(
                    f"the {type(owner).__name__} was moved or cast after its graph was recorded; make a new one"
                )
        self._graph.replay()
        return self.actions
