"""The recipes of the datasets that can be made here, and the behaviour policies that they use.

The linear policies ship with the package (`behaviours/`, whose README gives format, returns and provenance).
"""

from __future__ import annotations

import difflib
import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dql.shown import shown

_BEHAVIOURS = Path(__file__).parents[1] / "behaviours"


@dataclass(frozen=True)
class Part:
    """Episodes of one kind. Each draws one snapshot, one noise level and one share of random actions.

    Attributes:
        name: Enters the seeds, so recipes that share a part share its episodes.
        snapshots: "hopper-0/240" (search and iteration), "controller" (the pendulum's) or "random"; drawn
            uniformly.
        noise_std: Range of the episode's Gaussian noise, in units of half the action range; drawn uniformly.
        random_prob: Range of the episode's probability of a uniformly random action; drawn uniformly.
    """

    name: str
    snapshots: tuple[str, ...]
    noise_std: tuple[float, float] = (0.0, 0.0)
    random_prob: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Recipe:
    """How one dataset is made; its parts get equal shares of the steps."""

    id: str
    env_id: str
    steps: int
    description: str
    parts: tuple[Part, ...]
    needs_mujoco: bool = True

    @property
    def short_name(self) -> str:
        """The id without namespace and version: "hopper-medium-expert"."""
        return self.id.removeprefix("dql/").removesuffix("-v0").replace("/", "-")


@dataclass(frozen=True)
class LinearPolicy:
    """a = M ((s - mean) / std), not clipped (Mania, Guy, Recht 2018, section 3, V2)."""

    name: str
    M: np.ndarray  # [A, S]
    mean: np.ndarray  # [S]
    std: np.ndarray  # [S]
    return_mean: float  # of 10 deterministic episodes when it was found

    def __call__(self, observations: np.ndarray) -> np.ndarray:
        """Actions [..., A], float64 and not clipped, of observations [..., S]."""
        return linear_actions(self.M, self.mean, self.std, observations)


def linear_actions(M: np.ndarray, mean: np.ndarray, std: np.ndarray, observations: np.ndarray) -> np.ndarray:
    # One column at a time: BLAS would round a row differently in batches of other sizes, and an episode must
    # not depend on what runs beside it.
    white = (observations - mean) / std  # [..., S]
    actions = np.zeros(np.broadcast_shapes(M.shape[:-1], (*white.shape[:-1], M.shape[-2])))  # [..., A]
    for i in range(M.shape[-1]):
        actions += M[..., i] * white[..., i, None]
    return actions


def energy_controller(observations: np.ndarray) -> np.ndarray:
    """Swings Pendulum-v1 up by its energy and holds it with a PD rule near the top.

    With theta = 0 upright the environment has theta'' = 15 sin(theta) + 3 u, so
    E = theta'^2 / 2 + 15 (cos(theta) - 1) is 0 upright at rest and dE/dt = 3 u theta': torque along the
    velocity pumps (Astrom and Furuta 2000).

    Args:
        observations: [N, 3], (cos theta, sin theta, theta').

    Returns:
        Torques [N, 1] in [-2, 2], float64.
    """
    cos, sin, speed = (observations[:, i].astype(np.float64) for i in range(3))  # [N] each
    theta = np.arctan2(sin, cos)
    energy = 0.5 * speed**2 + 15.0 * (cos - 1.0)
    pump = -2.0 * np.clip(0.5 * energy, -1.0, 1.0) * np.where(speed >= 0.0, 1.0, -1.0)
    hold = -(7.0 * theta + 1.5 * speed)  # gains that leave the noisy episodes a mean return near -800
    near = (np.abs(theta) < 0.3) & (np.abs(speed) < 3.0)
    return np.clip(np.where(near, hold, pump), -2.0, 2.0)[:, None]


_SEARCHES = {
    "halfcheetah-0": 11,
    "halfcheetah-1": 6,
    "hopper-0": 16,
    "hopper-1": 12,
    "hopper-2": 19,
    "walker2d-0": 6,
}
_ENV_IDS = {"hopper": "Hopper-v5", "halfcheetah": "HalfCheetah-v5", "walker2d": "Walker2d-v5"}
# (mid-level snapshot, its noise), (best snapshot, its noise): the mid-level ones score about 0.4 of the
# best; the expert's small noise shows the learner what happens beside the expert's path.
_LEVELS = {
    "hopper": (("hopper-0/240", 0.2), ("hopper-0/320", 0.05)),
    "halfcheetah": (("halfcheetah-0/40", 0.1), ("halfcheetah-1/100", 0.05)),
    "walker2d": (("walker2d-0/60", 0.1), ("walker2d-0/120", 0.05)),
}


def _recipes() -> dict[str, Recipe]:
    found = [
        Recipe(
            id="dql/pendulum/mixed-v0",
            env_id="Pendulum-v1",
            steps=40_000,
            description="An energy swing-up controller; each episode takes uniformly random actions with a "
            "probability drawn between 30% and 100%.",
            parts=(Part("pendulum/mixed", ("controller",), random_prob=(0.3, 1.0)),),
            needs_mujoco=False,
        )
    ]
    for env, ((mid, mid_noise), (best, best_noise)) in _LEVELS.items():
        medium = Part(f"{env}/medium", (mid,), noise_std=(mid_noise, mid_noise))
        expert = Part(f"{env}/expert", (best,), noise_std=(best_noise, best_noise))
        every = tuple(f"{s}/{20 * (i + 1)}" for s, n in _SEARCHES.items() if s.startswith(env) for i in range(n))
        mixed = Part(f"{env}/mixed", ("random", *every), noise_std=(0.0, 0.3))
        told = {
            "medium": (200_000, (medium,), f"Linear policy {mid}, Gaussian action noise {mid_noise}."),
            "expert": (
                200_000,
                (expert,),
                f"The best linear policy, {best}, Gaussian action noise {best_noise}.",
            ),
            "medium-expert": (400_000, (medium, expert), "Half the steps as in medium, half as in expert."),
            "mixed": (
                200_000,
                (mixed,),
                f"Each episode draws one of {len(every)} linear policies, poor to best, or the random "
                + "policy, and Gaussian action noise between 0 and 0.3.",
            ),
        }
        found += [Recipe(f"dql/{env}/{k}-v0", _ENV_IDS[env], n, text, parts) for k, (n, parts, text) in told.items()]
    return {recipe.id: recipe for recipe in found}


RECIPES: dict[str, Recipe] = _recipes()


def resolve(name: str) -> Recipe:
    """The recipe of a dataset id ("dql/hopper/medium-v0") or short name ("hopper-medium").

    Raises:
        ValueError: No such recipe; lists those there are and the nearest.
    """
    names = {recipe.short_name: recipe for recipe in RECIPES.values()} | RECIPES
    if name in names:
        return names[name]
    close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    known = ", ".join(recipe.short_name for recipe in RECIPES.values())
    raise ValueError(f"no recipe {shown(name)}.{hint} Known: {known} (or their ids, such as 'dql/hopper/medium-v0').")


def behaviour_policy(search: str, iteration: int | None = None) -> LinearPolicy:
    """Loads a shipped linear policy.

    Args:
        search: A search ("hopper-0"), or an environment ("hopper") for the best of all its searches.
        iteration: A snapshot's iteration; None takes the best by its recorded mean return.

    Raises:
        ValueError: No such search or snapshot, or a file that does not hold what its README says.
    """
    files = [s for s in _SEARCHES if s == search or (iteration is None and s.rsplit("-", 1)[0] == search)]
    if not files:
        raise ValueError(
            f"no behaviour policy {shown(search)}; searches: {', '.join(_SEARCHES)}"
            f"{'' if iteration is None else ' (with an iteration, name the search and not the environment)'}."
        )
    if iteration is None:
        bests = [(name, data, int(np.argmax(data["return_mean"]))) for name, data in map(_read_search, files)]
        name, data, i = max(bests, key=lambda best: best[1]["return_mean"][best[2]])
    else:
        name, data = _read_search(search)
        known = data["iteration"].tolist()
        if iteration not in known:
            raise ValueError(f"search {search!r} has no snapshot of iteration {iteration}; it has {known}.")
        i = known.index(iteration)
    return LinearPolicy(
        name=f"{name}/{data['iteration'][i]}",
        M=data["M"][i].astype(np.float64),
        mean=data["mean"][i].astype(np.float64),
        std=data["std"][i].astype(np.float64),
        return_mean=float(data["return_mean"][i]),
    )


@functools.cache
def _read_search(search: str) -> tuple[str, dict[str, np.ndarray]]:
    return search, _read_behaviours(_BEHAVIOURS / f"{search}.npz")


def _read_behaviours(path: Path) -> dict[str, np.ndarray]:
    """The arrays of one search's file, checked against behaviours/README.md."""
    remedy = "Reinstall diffusion-ql: the file is part of the package."
    try:
        with np.load(path, allow_pickle=False) as file:
            data = {key: file[key] for key in file.files}
    except Exception as error:
        # numpy raises OSError, ValueError, EOFError or BadZipFile, by the kind of damage.
        raise ValueError(f"cannot read the behaviour policies {path}: {error}. {remedy}") from error
    shape: tuple[int, ...] = data["M"].shape if "M" in data else ()
    if len(shape) != 3 or shape[0] < 1:
        raise ValueError(f"{path}: M must be [n, A, S] with n >= 1 but is {shape or 'absent'}. {remedy}")
    n, _, S = shape
    wanted = dict.fromkeys(("iteration", "return_mean", "return_std", "length_mean", "env_steps"), (n,))
    for key, want in (wanted | {"mean": (n, S), "std": (n, S)}).items():
        have = data[key].shape if key in data else "absent"
        if have != want:
            raise ValueError(f"{path}: {key} must be {want} but is {have}. {remedy}")
    if not all(np.isfinite(array).all() for array in data.values()) or (data["std"] <= 0).any():
        raise ValueError(f"{path}: an array holds NaN or infinity, or std is not positive. {remedy}")
    return data
