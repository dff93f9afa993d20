"""What a careful user would write in JAX: the chain, the acting rule, and the training update as one compiled function.

All do what the published code does without its waste, as `lean.py` does for torch.compile, from the published networks'
parameters. Where two ways were tried the faster one is here (jax 0.10.2, one core with AVX-512): weights lie [in, out];
512-bit vectors, which XLA avoids unless it is told; calls run in the thread that makes them; the timesteps of the loss
are looked up by a product; only the Q that is maximised has a gradient. Scanning over the steps is as fast as unrolling
them, and flags of XLA beyond the one below change nothing.
"""

import os
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from lean import Draws
from published import TIME_DIM, PublishedActor, PublishedAgent, TimeEmbedding
from rivals import A, S, T
from torch import Tensor, nn

import dql

Array = jax.Array
Parameters = dict[str, Array]  # by the published names, weights as [in, out]
OPTIONS = {"xla_cpu_prefer_vector_width": 512}
GENERATOR = "unsafe_rbg"  # the fastest: XLA's own, for keys as for numbers
BLOCK = 256  # rows whose activations stay in the cache: at 2,560 in one a gradient takes twice as long
LAYERS = (2, 4)  # those between the first and the last
LR, BETA1, BETA2, EPSILON = 3e-4, 0.9, 0.999, 1e-8  # Adam's, as published
jax.tree_util.register_dataclass(Draws)


@lru_cache(maxsize=1)
def start() -> None:
    """Makes JAX's client, on the CPU, with as many threads as torch has now.

    Its pool is as large as NPROC says at that moment. What is often advised, XLA_FLAGS with
    --xla_cpu_multi_thread_eigen=false and intra_op_parallelism_threads=1, changes nothing: on two cores jax 0.10.2 took
    1.97 CPU seconds a second with it and without, with NPROC=1 1.00. So it is measured.

    Raises:
        AssertionError: it uses more threads, as when JAX was there before.
    """
    before = os.environ.get("NPROC")
    os.environ["NPROC"] = str(torch.get_num_threads())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    jax.devices()
    if before is None:
        del os.environ["NPROC"]
    else:
        os.environ["NPROC"] = before
    used, allowed = threads_used(), torch.get_num_threads()
    assert used < allowed + 0.25, f"jax computes with {used:.2f} threads, allowed {allowed}; was it there before?"


def threads_used(seconds: float = 0.1) -> float:
    """CPU seconds a second that products take which are large enough for all threads there are."""
    product = jax.jit(lambda x: jnp.tanh(x @ x))
    x = product(jnp.ones((1024, 1024))).block_until_ready()
    wall, cpu = time.perf_counter(), time.process_time()
    while time.perf_counter() < wall + seconds:
        product(x).block_until_ready()
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def array_of(tensor: Tensor) -> Array:
    """A copy: torch changes its own in place."""
    return jnp.array(tensor.detach().numpy())


def tensor_of(array: Array) -> Tensor:
    return torch.from_numpy(np.array(array))


def parameters_of(module: nn.Module) -> Parameters:
    start()
    return {name: array_of(p.T if p.dim() == 2 else p) for name, p in module.named_parameters()}


def tensors_of(parameters: Parameters) -> dict[str, Tensor]:
    """In torch's layout again."""
    return {name: tensor_of(p.T) for name, p in parameters.items()}


@jax.custom_vjp
def mish(z: Array) -> Array:
    """z tanh(softplus(z)) = z n / (n + 2) with n = e^z (e^z + 2), which is z from 20 on in float32."""
    e = jnp.exp(jnp.minimum(z, 20.0))
    n = e * (e + 2)
    return z * (n / (n + 2))


def _mish_bwd(z: Array, d_mish: Array) -> tuple[Array]:
    e = jnp.exp(jnp.minimum(z, 20.0))
    n = e * (e + 2)
    r = 1 / (n + 2)
    return (d_mish * (n * r + z * (4 * e * (e + 1)) * (r * r)),)


mish.defvjp(lambda z: (mish(z), z), _mish_bwd)


class Chain:
    """The reverse chain as a function of the parameters; the first layer is split into the parts of x, time and state.

    Args:
        actor: whose schedule it is.
    """

    def __init__(self, actor: PublishedActor) -> None:
        start()
        self.rows = dql.StepTable.ddpm(dql.NoiseSchedule("vp", T)).rows
        self.embedding = array_of(TimeEmbedding()(torch.arange(T, dtype=torch.float32)))  # [T, 16]
        self.mean = array_of(actor.sqrt_alphas_cumprod)  # [T]
        self.deviation = array_of(actor.sqrt_one_minus_alphas_cumprod)  # [T]

    def time_part(self, p: Parameters) -> Array:
        """Of the first layer, [T, H], with its bias."""
        hidden = mish(self.embedding @ p["time_mlp.1.weight"] + p["time_mlp.1.bias"])  # [T, 32]
        features = hidden @ p["time_mlp.3.weight"] + p["time_mlp.3.bias"]  # [T, 16]
        return features @ p["mid_layer.0.weight"][A : A + TIME_DIM] + p["mid_layer.0.bias"]

    def state_part(self, p: Parameters, states: Array) -> Array:
        """Of the first layer, [B, H]."""
        return states @ p["mid_layer.0.weight"][A + TIME_DIM :]

    def denoise(self, p: Parameters, x: Array, other_parts: Array) -> Array:
        """The noise in x [..., A], other_parts [..., H] being those of time and state."""
        h = mish(x @ p["mid_layer.0.weight"][:A] + other_parts)
        for i in LAYERS:
            h = mish(h @ p[f"mid_layer.{i}.weight"] + p[f"mid_layer.{i}.bias"])
        return h @ p["final_layer.weight"] + p["final_layer.bias"]

    def actions(self, p: Parameters, time_part: Array, state_part: Array, noise: Array) -> Array:
        """[R, A] for noise [T, R, A]; state_part is [R, H], or [1, H] for all rows."""
        x = noise[0]
        for k, (a, b, c0, cx, _, s) in enumerate(self.rows):
            eps = self.denoise(p, x, state_part + time_part[T - 1 - k])  # [R, A]
            x = c0 * jnp.clip(a * x - b * eps, -1, 1) + cx * x
            if s != 0:
                x = x + s * noise[k + 1]
        return jnp.clip(x, -1, 1)

    def sample(self, p: Parameters, states: Array, noise: Array) -> Array:
        return self.actions(p, self.time_part(p), self.state_part(p, states), noise)

    def bc_loss(self, p: Parameters, time_part: Array, state_part: Array, actions: Array, draws: Draws) -> Array:
        noisy = self.mean[draws.t, None] * actions + self.deviation[draws.t, None] * draws.eps
        parts = state_part + jax.nn.one_hot(draws.t, T) @ time_part  # a product: rows picked are a scatter backwards
        return jnp.mean((self.denoise(p, noisy, parts) - draws.eps) ** 2)


def one_critic(p: Parameters, name: str) -> Parameters:
    """The parameters of "q1_model" or "q2_model"."""
    return {key.removeprefix(f"{name}."): value for key, value in p.items() if key.startswith(f"{name}.")}


def q_value(p: Parameters, states: Array, actions: Array) -> Array:
    """[R] by one critic."""
    h = mish(jnp.concatenate([states, actions], axis=-1) @ p["0.weight"] + p["0.bias"])
    for i in LAYERS:
        h = mish(h @ p[f"{i}.weight"] + p[f"{i}.bias"])
    return (h @ p["6.weight"] + p["6.bias"])[:, 0]


def both_q(p: Parameters, states: Array, actions: Array) -> tuple[Array, Array]:
    q1, q2 = (q_value(one_critic(p, name), states, actions) for name in ("q1_model", "q2_model"))
    return q1, q2


def new_key() -> Array:
    """A key's bits, which are handed to a compiled function faster than a key."""
    return jax.random.key_data(jax.random.key(0, impl=GENERATOR))


def split(bits: Array, n: int) -> tuple[Array, list[Array]]:
    """(the bits of the next key, n keys)."""
    following, *keys = jax.random.split(jax.random.wrap_key_data(bits, impl=GENERATOR), n + 1)
    return jax.random.key_data(following), keys


def _drawing(function: Callable[..., Any], B: int, *arguments: Any) -> Callable[[Tensor | None], Any]:
    """`run(noise [T, B, A] or None)` -> function(*arguments, noise), which draws its own inside if None."""

    def draw(key: Array, *arguments: Any) -> tuple[Any, Array]:
        key, (used,) = split(key, 1)
        return function(*arguments, jax.random.normal(used, (T, B, A))), key

    given, drawn, key = jax.jit(function, compiler_options=OPTIONS), jax.jit(draw, compiler_options=OPTIONS), new_key()

    def run(noise: Tensor | None = None) -> Any:
        nonlocal key
        if noise is not None:
            return given(*arguments, array_of(noise))
        result, key = drawn(key, *arguments)
        return result

    return run


def sampler(actor: PublishedActor, states: Tensor) -> Callable[[Tensor | None], Any]:
    """`chain(noise [T, B, A] or None)` -> actions [B, A]: a tensor for noise given, else JAX's array.

    The parameters are constants of what is compiled, as those of an exported graph are.
    """
    run = _drawing(partial(Chain(actor).sample, parameters_of(actor.model)), len(states), array_of(states))
    return lambda noise=None: run().block_until_ready() if noise is None else tensor_of(run(noise))


def gradients(actor: PublishedActor, states: Tensor, weights: Tensor) -> Callable[[Tensor | None], Any]:
    """`gradients(noise [T, B, A] or None)` -> those of sum(actions * weights), by name; tensors for noise given.

    B is at most BLOCK or a multiple of it.
    """
    chain, d_actions, blocks = Chain(actor), array_of(weights), max(len(states) // BLOCK, 1)
    of_block = jax.grad(lambda p, states, noise, d_actions: jnp.vdot(chain.sample(p, states, noise), d_actions))

    def of_all(p: Parameters, states: Array, noise: Array) -> Parameters:
        if blocks == 1:
            return of_block(p, states, noise, d_actions)
        rows = states.reshape(blocks, -1, S), noise.reshape(T, blocks, -1, A).swapaxes(0, 1)
        return lax.scan(
            lambda total, block: (jax.tree.map(jnp.add, total, of_block(p, *block)), None),
            jax.tree.map(jnp.zeros_like, p),
            (*rows, d_actions.reshape(blocks, -1, A)),
        )[0]

    run = _drawing(of_all, len(states), parameters_of(actor.model), array_of(states))
    return lambda noise=None: jax.block_until_ready(run()) if noise is None else tensors_of(run(noise))


def jax_select(published: PublishedAgent, num_candidates: int) -> Callable[..., np.ndarray]:
    """`select(state [S], noise=None, draw=None)` -> action [A], as `lean.lean_select`; parameters are constants."""
    chain = Chain(published.actor)
    p, critic = parameters_of(published.actor.model), parameters_of(published.critic_target)

    def choose(state: Array, noise: Array, draw: Array) -> Array:
        candidates = chain.sample(p, state[None], noise)  # [N, A]; the state's part [1, H] is computed once
        q1, q2 = both_q(critic, jnp.broadcast_to(state, (num_candidates, S)), candidates)
        below = jnp.cumsum(jax.nn.softmax(jnp.minimum(q1, q2))) <= draw  # [N]
        return candidates[jnp.minimum(below.sum(), num_candidates - 1)]

    def drawn(state: Array, key: Array) -> tuple[Array, Array]:
        key, (first, second) = split(key, 2)
        return choose(state, jax.random.normal(first, (T, num_candidates, A)), jax.random.uniform(second)), key

    given, drawing = jax.jit(choose, compiler_options=OPTIONS), jax.jit(drawn, compiler_options=OPTIONS)
    key = new_key()

    def select(state: np.ndarray, noise: Tensor | None = None, draw: Tensor | None = None) -> np.ndarray:
        nonlocal key
        if noise is not None:
            return np.array(given(state, array_of(noise), array_of(draw)))
        action, key = drawing(state, key)
        return np.array(action)

    return select


class JaxAgent:
    """Diffusion-QL from the published agent's present state: an update is one compiled function of the whole state,
    whose memory it takes over.

    Attributes:
        state: `actor`, `ema_actor`, `critic`, `critic_target` (Parameters); Adam's averages of the gradients and of
            their squares, `actor_mean`, `actor_square`, `critic_mean`, `critic_square`; `step`; `key`.
    """

    def __init__(self, published: PublishedAgent) -> None:
        self.constants, self.chain = published, Chain(published.actor)
        modules = {"actor": published.actor.model, "ema_actor": published.ema_actor.model}
        modules |= {"critic": published.critic, "critic_target": published.critic_target}
        self.state: dict[str, Any] = {name: parameters_of(module) for name, module in modules.items()}
        for name in ("actor", "critic"):
            for kind in ("mean", "square"):
                self.state[f"{name}_{kind}"] = jax.tree.map(jnp.zeros_like, self.state[name])
        self.state |= {"step": jnp.array(published.step), "key": new_key()}
        compiled = partial(jax.jit, donate_argnums=0, compiler_options=OPTIONS)
        self._given, self._drawn = compiled(self._learn), compiled(self._draw_and_learn)

    def update(self, batch: dict[str, Array], draws: Draws | None = None) -> dict[str, Array]:
        """One update; the losses. `draws`, of torch's tensors, for closeness checks."""
        if draws is None:
            self.state, losses = self._drawn(self.state, batch)
        else:
            arrays = Draws(**{name: array_of(value) for name, value in vars(draws).items()})
            self.state, losses = self._given(self.state, batch, arrays)
        jax.block_until_ready((self.state, losses))
        return losses

    def averages(self) -> dict[str, Tensor]:
        """Adam's, of the gradients, by name."""
        parts = {name: tensors_of(self.state[f"{name}_mean"]) for name in ("actor", "critic")}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}

    def parameters(self) -> dict[str, Tensor]:
        """Of all four networks, by name."""
        parts = {name: tensors_of(self.state[name]) for name in ("actor", "ema_actor", "critic", "critic_target")}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}

    @property
    def candidates(self) -> int:
        """Actions for a next state."""
        return self.constants.num_backup if self.constants.max_q_backup else 1

    def _draw_and_learn(self, state: dict[str, Any], batch: dict[str, Array]) -> tuple[dict[str, Any], dict]:
        B = len(batch["states"])
        key, used = split(state["key"], 5)
        draws = Draws(
            jax.random.normal(used[0], (T, B * self.candidates, A)),
            jax.random.randint(used[1], (B,), 0, T),
            jax.random.normal(used[2], (B, A)),
            jax.random.normal(used[3], (T, B, A)),
            jax.random.bernoulli(used[4]),
        )
        return self._learn(state | {"key": key}, batch, draws)

    def _learn(self, state: dict[str, Any], batch: dict[str, Array], draws: Draws) -> tuple[dict[str, Any], dict]:
        c, step = self.constants, state["step"]
        target = self._target(state, batch, draws.target)
        critic_loss, gradient = jax.value_and_grad(self._critic_loss)(state["critic"], batch, target)
        state = state | self._stepped(state, "critic", gradient)
        losses, gradient = jax.value_and_grad(self._actor_loss, has_aux=True)(
            state["actor"], state["critic"], batch, draws
        )
        state = state | self._stepped(state, "actor", gradient)
        averaged = (step % c.ema_every == 0) & (step >= c.ema_start)
        ema_actor = _lerp(state["ema_actor"], state["actor"], jnp.where(averaged, 1 - c.ema_decay, 0.0))
        critic_target = _lerp(state["critic_target"], state["critic"], c.tau)
        state = state | {"ema_actor": ema_actor, "critic_target": critic_target, "step": step + 1}
        actor_loss, (bc_loss, q_loss) = losses
        names = ("actor/loss", "actor/bc_loss", "actor/q_loss", "critic/loss")
        return state, dict(zip(names, (actor_loss, bc_loss, q_loss, critic_loss), strict=True))

    def _target(self, state: dict[str, Any], batch: dict[str, Array], noise: Array) -> Array:
        """r + mask * discount * min(max Q1', max Q2') over the candidates [B]."""
        p, states, N = state["ema_actor"], batch["next_states"], self.candidates
        part = jnp.repeat(self.chain.state_part(p, states), N, axis=0)  # [B N, H]
        actions = self.chain.actions(p, self.chain.time_part(p), part, noise)
        q1, q2 = both_q(state["critic_target"], jnp.repeat(states, N, axis=0), actions)
        best = jnp.minimum(q1.reshape(-1, N).max(axis=1), q2.reshape(-1, N).max(axis=1))
        return batch["rewards"] + batch["masks"] * self.constants.discount * best

    def _critic_loss(self, p: Parameters, batch: dict[str, Array], target: Array) -> Array:
        q1, q2 = both_q(p, batch["states"], batch["actions"])
        return jnp.mean((q1 - target) ** 2) + jnp.mean((q2 - target) ** 2)

    def _actor_loss(
        self, p: Parameters, critic: Parameters, batch: dict[str, Array], draws: Draws
    ) -> tuple[Array, tuple[Array, Array]]:
        """(loss, (bc_loss, q_loss))."""
        states = batch["states"]
        time_part, state_part = self.chain.time_part(p), self.chain.state_part(p, states)
        bc_loss = self.chain.bc_loss(p, time_part, state_part, batch["actions"], draws)
        actions = self.chain.actions(p, time_part, state_part, draws.actor)
        q1, q2 = one_critic(critic, "q1_model"), one_critic(critic, "q2_model")
        pick = partial(jax.tree.map, lambda a, b: jnp.where(draws.first, a, b))  # weights are fewer than activations
        other = q_value(pick(q2, q1), states, lax.stop_gradient(actions))
        q_loss = -q_value(pick(q1, q2), states, actions).mean() / jnp.abs(other).mean()
        return bc_loss + self.constants.eta * q_loss, (bc_loss, q_loss)

    def _stepped(self, state: dict[str, Any], name: str, gradient: Parameters) -> dict[str, Parameters]:
        """Adam's step for "actor" or "critic", the gradient's norm clipped."""
        if self.constants.grad_norm > 0:
            norm = jnp.sqrt(sum(jnp.vdot(g, g) for g in gradient.values()))
            scale = jnp.minimum(self.constants.grad_norm / (norm + 1e-6), 1.0)
            gradient = {key: scale * g for key, g in gradient.items()}
        count = state["step"] + 1
        rate, root = LR / (1 - BETA1**count), jnp.sqrt(1 - BETA2**count)
        mean = {key: BETA1 * m + (1 - BETA1) * gradient[key] for key, m in state[f"{name}_mean"].items()}
        square = {key: BETA2 * v + (1 - BETA2) * gradient[key] ** 2 for key, v in state[f"{name}_square"].items()}
        moved = {k: p - rate * mean[k] / (jnp.sqrt(square[k]) / root + EPSILON) for k, p in state[name].items()}
        return {name: moved, f"{name}_mean": mean, f"{name}_square": square}


def _lerp(old: Parameters, new: Parameters, weight: Array | float) -> Parameters:
    return {name: value + weight * (new[name] - value) for name, value in old.items()}
