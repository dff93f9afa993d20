"""One kind of call of one GPU backend, checked and timed, in a process of its own: what `bench/gpu.sh` looks at first.

    PYTHONPATH=.:bench python -m gpu.checks BACKEND PRECISION KIND [--small] [--device cpu]

A line of JSON for each thing looked at, as soon as it is known: {"what", "error", "limit", "us", "why"}. The error is
|got - want| / |want| against eager torch in float64 on the same device, the worst of several tensors, of buffers that
were full of NaN; `us` the shortest device time of a call, taken whether it was right or not, other checks running
beside it; `why` the first line of what was raised. It exits 1 if anything is wrong, 77 if the kind cannot be here.
S = 17, A = 6, H = 256, T = 5, random inputs; --small, for the sanitizers and where no GPU runs the kernels: S = 11,
A = 3, H = 48, T = 2, few rows, no times.
"""

import argparse
import contextlib
import copy
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import device_time
import rivals
import torch

import dql
from dql.backend.registry import of_gpus, registry
from dql.kernels.capture import repeated
from dql.kernels.cuda import binding
from dql.kernels.cuda.plan import SOLO_ROWS, WIDE, Problem, Tiling, forced, shared_bytes, without
from dql.values import q_values
from gpu.parts import NOTHING_TO_DO

Tensor = torch.Tensor
Pair = tuple[Callable[[], float], Callable[[], object]]  # the error of a call; the call, as it is timed
SEED = 3
SIZES, SMALL_SIZES = (256, 1, 37, 65536), (37, 1)  # a fast answer of the headline size first
ACTIONS = {"fp32": 1e-4, "tf32": 5e-3, "bf16": 3e-2}  # as bench_gpu.py has them
GRADIENTS = {"fp32": 1e-4, "tf32": 2e-2, "bf16": 1e-1}
MARGINS = {"fp32": rivals.CLAMP_MARGIN, "tf32": 2e-2, "bf16": 1e-1}
OTHER_DRAWS = {"fp32": 0.02, "tf32": 0.1, "bf16": 0.3}  # of `select`: rounding may move a draw over a border
NOISE, LOSSES = 1e-5, 1e-3
TILINGS = {f"cluster{c}": Tiling(c, 1, True) for c in (8, 4, 2, 1)}
TILINGS |= {f"solo{tiling.rows}": tiling for tiling in map(Tiling.alone, SOLO_ROWS)}
TILINGS |= {"streamed": Tiling(1, 2, False), "wide": Tiling(1, WIDE, False)}
KINDS = ("forward", "gradient", "select", "graph", "update", "noise", "clusters", *TILINGS, "compare", "all", "profile")
PROFILED = (  # what Nsight Compute looks at
    *(("chain", B, "bf16") for B in (1, 256, 2500, 65536)),
    *(("chain", 256, "fp32"), ("gradients", 256, "bf16"), ("gradients", 256, "fp32"), ("choice", 1, "bf16")),
)


def kinds(backend: str, small: bool) -> list[tuple[str, str]]:
    """(precision, kind) of every check of a backend, the headline's first; small, which is slow, without tf32."""
    found = [(p, kind) for kind in KINDS[:4] for p in ("bf16", "fp32", "tf32")[: 2 if small else 3]]
    found += [("fp32", "update"), ("any", "noise")]
    tilings = [("any", name) for name in TILINGS]
    return [("any", "clusters"), *found, ("any", "compare"), *tilings] if backend == "cuda" else found


class Checks:
    """The checks of one backend in one precision ("any" where the kind has its own), on a device."""

    def __init__(self, backend: str, precision: str, device: torch.device, small: bool) -> None:
        self.backend, self.precision, self.device, self.small = backend, precision, device, small
        self.sizes = SMALL_SIZES if small else SIZES
        self.wrong = False

    def look(self, what: str, limit: float, check: Callable[[], float], call: Callable[[], object] | None) -> None:
        """Tells the check's error and the call's device time, or what either raised."""
        error = us = why = None
        try:
            with poisoned(self.device):
                error = check()
            why = None if error <= limit else "wrong"
            if call is not None and not self.small:
                us = 1e6 * min(device_time.device_time(call).seconds)  # of other checks on the GPU the least
        except Exception as raised:  # whatever a kernel or its compiler raises
            traceback.print_exc()
            lines = [line.strip() for line in str(raised).splitlines() if line.strip()]
            why = f"{type(raised).__name__}: {lines[0] if lines else ''}"[:200]  # advice follows
        self.wrong |= why is not None
        tell(what, error, limit, us, why)

    # The calls: how far they are off, and what is timed

    def problem(self, B: int, precision: str) -> tuple[dql.DiffusionPolicy, Tensor, Tensor, Tensor]:
        """(policy, states [B, S], noise [T, B, A], weights [B, A] of a loss)."""
        actor = rivals.published_actor(self.device)
        policy = dql.DiffusionPolicy.from_published(actor.state_dict()).to(self.device)
        return policy, *rivals.problem(B, self.device, MARGINS[precision])

    def chain(self, B: int, precision: str) -> Pair:
        policy, states, noise, _ = self.problem(B, precision)

        @torch.no_grad()
        def ours(**options: Any) -> Tensor:
            return dql.sample(states, policy, backend=self.backend, precision=precision, **options)

        def check() -> float:
            want = dql.sample(states.double(), in_float64(policy), backend="eager", noise=noise.double())
            return worst([(ours(noise=noise), want)])

        return check, lambda: ours(seed=SEED)

    def gradients(self, B: int, precision: str) -> Pair:
        policy, states, noise, weights = self.problem(B, precision)

        def of(policy: dql.DiffusionPolicy, states: Tensor, **options: Any) -> list[Tensor]:
            inputs = states.detach().requires_grad_()
            actions = dql.sample(inputs, policy, **options)
            return list(torch.autograd.grad(actions, [inputs, *policy.denoiser.parameters()], weights.to(actions)))

        options = {"backend": self.backend, "precision": precision}

        def check() -> float:
            want = of(in_float64(policy), states.double(), backend="eager", noise=noise.double())
            return worst(zip(of(policy, states, noise=noise, **options), want, strict=True))

        return check, lambda: of(policy, states, seed=SEED, **options)

    def choice(self, _: int, precision: str) -> Pair:
        """`select` for 50 states, timed for one."""
        policy, states, _, _ = self.problem(50, precision)
        critic = self.critic()

        def of(states: Tensor, **options: Any) -> Tensor:
            return dql.select(states, policy, critic, seed=SEED, **options)

        ours = {"backend": self.backend, "precision": precision}

        def check() -> float:
            far = (of(states, **ours) - of(states, backend="eager")).abs().amax(dim=1) > 10 * ACTIONS[precision]
            return float(far.double().mean())

        return check, lambda: of(states[:1], **ours)

    def critic(self) -> dql.TwinCritic:
        torch.manual_seed(1)
        critic = dql.TwinCritic(rivals.S, rivals.A, rivals.H).to(self.device)
        with torch.no_grad():
            critic.flat.mul_(4)  # torch's default ones hardly differ in Q
        return critic

    def critics(self) -> float:
        """Both Q values and all their gradients."""
        critic, results = self.critic(), []
        states, actions = (torch.randn(self.sizes[0], n, device=self.device) for n in (rivals.S, rivals.A))
        pairs = (critic, self.backend, torch.float32), (copy.deepcopy(critic).double(), "eager", torch.float64)
        for of, name, dtype in pairs:
            inputs = [states.to(dtype).requires_grad_(), actions.to(dtype).requires_grad_()]
            q1, q2 = q_values(of, inputs[0], inputs[1], registry()[name])
            every = torch.autograd.grad((q1 - 2 * q2).sum(), [*inputs, *of.parameters()])
            results.append([q1.detach(), q2.detach(), *every])
        return worst(zip(*results, strict=True))

    # The kinds

    def forward(self) -> None:
        for B in self.sizes:
            self.look(f"B={B}", ACTIONS[self.precision], *self.chain(B, self.precision))

    def gradient(self) -> None:
        for B in self.sizes[: 1 if self.small else 3]:
            self.look(f"B={B}", GRADIENTS[self.precision], *self.gradients(B, self.precision))

    def select(self) -> None:
        self.look("draws that differ", OTHER_DRAWS[self.precision], *self.choice(1, self.precision))
        if self.precision == "fp32":  # which critics are trained in
            self.look("critics", GRADIENTS["fp32"], self.critics, None)

    def noise(self) -> None:
        rows = 100 if self.small else 1000

        def draw() -> Tensor:
            return registry()[self.backend].normal(SEED, 5, rows, 6, torch.empty(0, device=self.device))

        self.look("", NOISE, lambda: worst([(draw(), dql.noise.normal(SEED, 5, rows, 6))]), draw)

    def graph(self) -> None:
        """A graph's replay gives the plain call's bits and sees changes; the whole call of `GraphedSampler`."""
        if self.device.type != "cuda":
            nothing_to_do("a CUDA graph needs a GPU")
        options = {"backend": self.backend, "precision": self.precision}
        for B in self.sizes[:2]:
            policy, states, _, _ = self.problem(B, self.precision)
            fed, results = states.clone(), []

            @torch.no_grad()
            def call(fed: Tensor = fed, policy: Any = policy) -> Tensor:
                return dql.sample(fed, policy, seed=SEED, **options)

            @torch.no_grad()
            def check(fed: Tensor = fed, policy: Any = policy, call: Any = call, results: Any = results) -> float:
                graph = repeated(lambda: results.append(call()))
                policy.denoiser.flat.mul_(1.1)
                fed.neg_()
                results[-1].fill_(torch.nan)
                graph.replay()
                return worst([(results[-1], call())])

            self.look(f"B={B}", 0.0, check, None)
            sampler = dql.GraphedSampler(policy, B, **options)
            tell(f"B={B} whole call", us=device_time.host_time(lambda s=sampler, states=states: s.run(states)))

    def update(self) -> None:
        """Losses of the fifth update beside eager's, plain and as a CUDA graph."""
        B, S, A, updates = self.sizes[0], rivals.S, rivals.A, 1 if self.small else 5
        torch.manual_seed(2)
        batch = dql.Batch(torch.randn(B, S), torch.rand(B, A) * 2 - 1, torch.randn(B), torch.randn(B, S), torch.ones(B))
        batch = batch.to(self.device)

        def agent(backend: str) -> dql.DiffusionQL:
            torch.manual_seed(2)
            return dql.DiffusionQL(S, A, dql.Config(backend=backend, hidden_dim=rivals.H), device=self.device)

        def losses(update: Callable[[dql.Batch], dict[str, Tensor]]) -> Tensor:
            told = [{name: loss.clone() for name, loss in update(batch).items()} for _ in range(updates)][-1]
            return torch.stack([told[name] for name in sorted(told)])

        eager, mine = losses(agent("eager").update), agent(self.backend)
        # No device time: Adam's step cannot be captured, and a profiler would slow down all that comes after.
        self.look("plain", LOSSES, lambda: worst([(losses(mine.update), eager)]), None)
        if self.device.type == "cuda":
            tell("plain, whole call", us=device_time.host_time(lambda: mine.update(batch)))
            graphed = dql.GraphedUpdate(agent(self.backend), B)
            self.look("graphed", LOSSES, lambda: worst([(losses(graphed.update), eager)]), None)
            tell("graphed, whole call", us=device_time.host_time(lambda: graphed.update(batch)))

    def clusters(self) -> None:
        """How many clusters of 2, 4 and 8 blocks the device places at a time: for the paper's network, not saving."""
        emulated = binding.emulating()
        mlp = binding.mlp(dql.Denoiser(17, 6, 256).spec, emulated)
        for blocks in (2, 4, 8):
            most = binding.load(emulated).max_clusters(0, mlp, *Tiling(blocks, 1, True).numbers("bf16"), 0)
            tell(f"{most} of {blocks}")

    def tiling(self, name: str) -> None:
        tiling, wide = TILINGS[name], TILINGS[name].m_tiles == WIDE
        capability, _, shared, can_run_wide = binding.facts(0, binding.emulating())
        if (tiling.resident and not tiling.solo and capability < 90) or (wide and not can_run_wide):
            nothing_to_do(f"compute capability {capability / 10} has no such kernels")
        spec = dql.Denoiser(rivals.S, rivals.A, rivals.H).spec
        for precision in ("bf16", "fp32", "tf32")[: 1 if wide or tiling.solo or self.small else 3]:
            needs = shared_bytes(Problem(spec, precision, self.sizes[0], rivals.T, 1, False), tiling)
            if needs > shared:
                tell(f"{precision} does not fit: {needs >> 10} of {shared >> 10} KB")
                continue
            with forced(tiling):
                for B in self.sizes[::2]:
                    self.look(f"{precision} B={B}", ACTIONS[precision], *self.chain(B, precision))
                if not wide and tiling.solo != 4:
                    pair = self.gradients(self.sizes[0], precision)
                    self.look(f"{precision} gradient", GRADIENTS[precision], *pair)

    def compare(self) -> None:
        """What makes few rows fast, beside the same without it: one block alone at every height; a cluster's exchange
        of the rows that there are; a prologue and a chain that ask for the same shared memory."""
        capability, _, shared, _ = binding.facts(0, binding.emulating())
        spec = dql.Denoiser(rivals.S, rivals.A, rivals.H).spec
        cluster = {B: Tiling(8 if B == 1 else 4, 1, True) for B in (1, 37, 256)}
        for B in (1,) if self.small else (1, 256, 2500):
            tilings = [*map(Tiling.alone, SOLO_ROWS), *([cluster[B]] if B in cluster and capability >= 90 else [])]
            for tiling in tilings:
                if shared_bytes(Problem(spec, "bf16", B, rivals.T, 1, False), tiling) <= shared:
                    with forced(tiling):
                        self.look(f"bf16 B={B} {tiling}", ACTIONS["bf16"], *self.chain(B, "bf16"))
        if capability < 90:
            return
        emulated = binding.emulating()
        load = binding.load(emulated)
        for precision in ("bf16",) if self.small else ("bf16", "tf32", "fp32"):
            for B in (1,) if self.small else (1, 37):
                problem = Problem(spec, precision, B, rivals.T, 1, False)
                numbers = cluster[B].numbers(precision)
                if shared_bytes(problem, cluster[B]) > shared or not load.max_clusters(
                    0, binding.mlp(spec, emulated), *numbers, 0
                ):
                    continue
                with forced(cluster[B]):
                    for what in (None, "few rows", "carve-out"):
                        with without(what) if what else contextlib.nullcontext():
                            name = f"{precision} B={B} {cluster[B]}" + (f" without {what}" if what else "")
                            self.look(name, ACTIONS[precision], *self.chain(B, precision))

    def all(self) -> None:
        """Every kernel once, for a sanitizer to watch."""
        for self.precision in ACTIONS:
            self.forward()
            self.gradient()
            self.select()
        self.noise()
        for name in TILINGS if self.backend == "cuda" else ():
            with contextlib.suppress(SystemExit):  # one that this GPU does not have
                self.tiling(name)

    def profile(self) -> None:
        """Each of PROFILED once between two marks, after a warm-up."""
        calls = [getattr(self, what)(B, precision)[1] for what, B, precision in PROFILED]
        for call in calls * 2:
            call()
        mark = torch.zeros(1, dtype=torch.int32, device=self.device)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        for call in calls:
            torch.bitwise_not(mark)
            call()
            torch.cuda.synchronize()
        torch.cuda.profiler.stop()


@contextlib.contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """What torch allocates is full of NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
        if device.type == "cuda":
            torch.cuda.synchronize()  # what a kernel did wrong shows here
    finally:
        torch.use_deterministic_algorithms(False)


def in_float64(policy: dql.DiffusionPolicy) -> dql.DiffusionPolicy:
    return copy.deepcopy(policy).to(torch.float64)


def worst(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The largest |got - want| / |want|; infinite where something is not finite."""
    errors = []
    for got, want in pairs:
        wide = want.detach().to(got.device, torch.float64)
        errors.append(float((got.detach().double() - wide).norm() / wide.norm().clamp_min(1e-30)))
    return max(error if error == error else float("inf") for error in errors)


def tell(
    what: str, error: float | None = None, limit: float | None = None, us: float | None = None, why: str | None = None
) -> None:
    print(json.dumps({"what": what, "error": error, "limit": limit, "us": us, "why": why}), flush=True)


def nothing_to_do(why: str) -> NoReturn:
    tell("", why=why)
    sys.exit(NOTHING_TO_DO)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backend", choices=of_gpus())
    parser.add_argument("precision", choices=("fp32", "tf32", "bf16", "any"))
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--device", default="cuda", type=torch.device)
    parser.add_argument("--small", action="store_true")
    chosen = parser.parse_args()
    if chosen.small:
        rivals.S, rivals.A, rivals.H, rivals.T = 11, 3, 48, 2
    if chosen.device.type == "cuda":
        chosen.device = torch.device("cuda", torch.cuda.current_device())  # as tensors name theirs
    if (reason := dql.backends()[chosen.backend]) is not None:
        nothing_to_do(reason)
    checks = Checks(chosen.backend, chosen.precision, chosen.device, chosen.small)
    if chosen.kind in TILINGS:
        checks.tiling(chosen.kind)
    else:
        getattr(checks, chosen.kind)()
    return int(checks.wrong)


if __name__ == "__main__":
    ended = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # a context in which a kernel hangs is not taken down
