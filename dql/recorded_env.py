"""Which environments that a dataset or a run folder names are made: whatever is read there must not run as code.

A recorded spec is JSON with an id, an entry point and wrappers, and Gymnasium would import and call what it names. Here

    id               is looked up among the ids registered in this process, those of gymnasium-robotics included; its
                     registration's own entry point is used, never the recorded one. "module:Id" is refused
    entry point      recorded of another package than gymnasium or gymnasium-robotics: that id is refused unless this
                     process has it registered
    kwargs           numbers, texts, lists, dicts; no text that is a path
    wrappers         PURE ones are made, of gymnasium.wrappers whatever the record says; IGNORED ones are left out: they
                     change rewards (a score is of the raw reward), draw, record, or are added by gymnasium.make anyway;
                     all others are refused. NormalizeObservation is: its statistics are not in the record, and with
                     fresh ones a policy sees other observations than the data have. So is a limit of its own beside
                     COUNTING ones: the record does not say which of them was outside
    numbers          of steps, frames and repetitions are bounded, those that multiply also together: a signal waits for
                     one step of MuJoCo's

What is refused asks for `--env ID`, which the user typed: then Gymnasium's own rules hold, "module:Id" included.
"""

import contextlib
import inspect
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import gymnasium
import numpy as np
from gymnasium.envs.registration import EnvSpec

from dql.shown import said

# With parameters of its own each is a function of the episode so far, and ends with it.
PURE = {
    *("ClipAction", "DelayObservation", "DtypeObservation", "FilterObservation", "FlattenObservation"),
    *("FrameStackObservation", "MaxAndSkipObservation", "RepeatAction", "RescaleAction", "RescaleObservation"),
    *("ReshapeObservation", "StickyAction", "TimeAwareObservation", "TimeLimit"),
}
REWARD = {"ClipReward", "NormalizeReward", "TransformReward"}
IGNORED = REWARD | {
    *("OrderEnforcing", "PassiveEnvChecker", "RecordEpisodeStatistics", "RecordVideo", "RenderCollection"),
    *("HumanRendering", "Autoreset", "AutoResetWrapper", "StepAPICompatibility"),
}
COUNTING = {"MaxAndSkipObservation", "RepeatAction", "TimeAwareObservation"}  # steps: where a limit stands matters
_MOST_WRAPPERS, _MOST_LEAVES, _MOST_COUNT, _MOST_STEPS = 32, 10_000, 1000, 1_000_000
_ROBOTICS = ("AntMaze", "PointMaze", "FrankaKitchen", "AdroitHand", "Fetch", "HandManipulate", "HandReach")
_PACKAGES = ("gymnasium", "gymnasium_robotics")
_MOST_TEXT = 1 << 20


class SpecRefusedError(ValueError):
    """A recorded spec that is not followed; the message says what of it, without a remedy."""


def reward_wrappers(spec_json: str | None) -> list[str]:
    """Names of the wrappers of a recorded spec that change rewards."""
    return [name for name in _names(spec_json) if name in REWARD]


def missing_wrappers(recorded: str | None, evaluated: str | None) -> list[str]:
    """Names of a recorded spec's wrappers that change observations or actions and that the other spec lacks."""
    harmless = IGNORED | {"DataCollector", "TimeLimit"}
    there = Counter(_names(evaluated))
    wanted = Counter(name for name in _names(recorded) if re.sub(r"V\d+$", "", name) not in harmless)
    return sorted(ascii(name[:80])[1:-1] for name in wanted - there)  # a terminal obeys what it is shown


def _names(spec_json: str | None) -> list[str]:
    """Of all wrappers, made or not; none of what is no spec."""
    try:
        listed = parse_spec(spec_json or '{"id": "none"}').get("additional_wrappers")
    except SpecRefusedError:
        return []
    wrappers = [wrapper for wrapper in listed if isinstance(wrapper, dict)] if isinstance(listed, list) else []
    return [str(wrapper.get("entry_point") or wrapper.get("name")).rpartition(":")[2] for wrapper in wrappers]


def same_evaluation(one: str | None, other: str | None) -> bool:
    """Whether two records make the same environment."""
    return one == other or _essence(one) == _essence(other)


def _essence(text: str | None) -> Any:
    try:
        spec = None if text is None else parse_spec(text)
        wrappers = [] if spec is None else [(n, a) for n, a in _wrappers(spec) if n not in IGNORED]
    except SpecRefusedError:
        return text
    return None if spec is None else (spec["id"], spec.get("kwargs") or {}, spec.get("max_episode_steps"), wrappers)


def parse_spec(text: str) -> dict[str, Any]:
    """The JSON object of a spec.

    Raises:
        SpecRefusedError: it is none, or has no id.
    """
    try:
        spec = json.loads(text) if len(text) <= _MOST_TEXT else None
    except (ValueError, RecursionError, TypeError):
        spec = None
    if not isinstance(spec, dict) or not isinstance(spec.get("id"), str) or not spec["id"]:
        raise SpecRefusedError("its spec is no JSON object with an id")
    return spec


def make_recorded(text: str) -> gymnasium.Env:
    """Makes the environment of a recorded spec by the rule above.

    Raises:
        SpecRefusedError: the rule refuses it.
        gymnasium.error.Error, ImportError: Gymnasium cannot make it here.
    """
    spec = parse_spec(text)
    env_id, entry_point = spec["id"], spec.get("entry_point")
    if ":" in env_id:
        raise SpecRefusedError(f"its id {env_id!r} would import a module")
    package = str(entry_point).partition(":")[0].partition(".")[0]
    if package == "gymnasium_robotics" or (entry_point is None and env_id.startswith(_ROBOTICS)):
        import gymnasium_robotics

        gymnasium.register_envs(gymnasium_robotics)
    if env_id not in gymnasium.registry and entry_point is not None and package not in _PACKAGES:
        raise SpecRefusedError(
            f"its id {env_id!r} is not registered, and its recorded entry point {str(entry_point)[:80]!r} would run as "
            "code"
        )
    kwargs = spec.get("kwargs") or {}
    _check_kwargs("its", kwargs)
    limit = spec.get("max_episode_steps", "of the registration")
    if limit is None:
        limit = -1  # which is how one without a limit is recorded
    elif isinstance(limit, bool) or not isinstance(limit, int) or not -1 <= limit <= _MOST_STEPS or limit == 0:
        if limit != "of the registration":
            raise SpecRefusedError(f"its max_episode_steps is {str(limit)[:40]}")
        limit = None
    registered = gymnasium.registry.get(env_id)
    wrappers = _wrappers(spec | {"additional_wrappers": _beyond_registration(spec, registered)})
    counting = [name for name, _ in wrappers if name in COUNTING]
    if counting and limit is not None and registered and limit != (registered.max_episode_steps or -1):
        raise SpecRefusedError(
            f"its limit of {limit} steps is not the registration's, and the record does not say whether it stood "
            f"inside or outside of {counting[0]}"
        )
    for name, arguments in wrappers:
        if name not in PURE | IGNORED:
            why = " whose statistics are not in the record" if name == "NormalizeObservation" else ""
            raise SpecRefusedError(f"it is wrapped in {name},{why or ' which is not made from a record'}")
        if name in PURE:
            _check_kwargs(f"{name}'s", arguments)
    _check_frames(kwargs, wrappers)
    kwargs = {key: value for key, value in kwargs.items() if key != "render_mode"}  # nobody watches an evaluation
    env = _make(env_id, limit, kwargs)
    for name, arguments in wrappers:
        if name in PURE:
            env = _wrap(env, name, arguments)
    return env


def make_typed(env_id: str) -> gymnasium.Env:
    """Makes the environment that the user named; a module before its id may lie in the working folder."""
    if ":" not in env_id and env_id.startswith(_ROBOTICS):
        with contextlib.suppress(ImportError):
            import gymnasium_robotics

            gymnasium.register_envs(gymnasium_robotics)
    with _working_folder_last():
        return gymnasium.make(env_id)


@contextlib.contextmanager
def _working_folder_last() -> Iterator[None]:
    """Modules of the working folder can be imported, and hide no other: the console script does not have it there."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


def _make(env_id: str, limit: int | None, kwargs: dict[str, Any]) -> gymnasium.Env:
    try:
        return gymnasium.make(env_id, max_episode_steps=limit, **kwargs)
    except (TypeError, ValueError, AssertionError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise SpecRefusedError(f"its registration does not take what the record says ({said(error)})") from error


def _wrap(env: gymnasium.Env, name: str, arguments: Mapping[str, Any]) -> gymnasium.Env:
    kind = getattr(gymnasium.wrappers, name)
    known = inspect.signature(kind.__init__).parameters.keys() - {"self", "env"}
    given = dict(arguments)
    if unknown := sorted(given.keys() - known):
        raise SpecRefusedError(f"its wrapper {name} has the argument {unknown[0][:40]!r}, which is not known here")
    for key, value in given.items():
        if isinstance(value, int) and abs(value) > (_MOST_STEPS if name == "TimeLimit" else _MOST_COUNT):
            raise SpecRefusedError(f"its wrapper {name} has {key} = {value}, more than {_MOST_COUNT:,}")
    if name in ("RescaleAction", "RescaleObservation"):  # arrays that JSON holds as lists
        given = {key: np.asarray(v, np.float32) if isinstance(v, list) else v for key, v in given.items()}
    elif name in ("ReshapeObservation", "StickyAction"):
        given = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items()}
    try:
        return kind(env, **given)
    except Exception as error:  # whatever a constructor makes of hostile arguments
        raise SpecRefusedError(f"its wrapper {name} does not take what the record says ({said(error)})") from error


def _wrappers(spec: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, arguments) of each, innermost first; the name is the entry point's, which is what would be called."""
    listed = spec.get("additional_wrappers") or []
    if not isinstance(listed, list):
        raise SpecRefusedError("its additional_wrappers are no list")
    if len(listed) > _MOST_WRAPPERS:
        raise SpecRefusedError(f"it has {len(listed):,} wrappers, more than {_MOST_WRAPPERS}")
    found = []
    for wrapper in listed:
        if not isinstance(wrapper, dict):
            raise SpecRefusedError("one of its additional_wrappers is no JSON object")
        entry_point = str(wrapper.get("entry_point") or wrapper.get("name"))
        module, _, name = entry_point.rpartition(":")
        if module.partition(".")[0] == "minari" and name == "DataCollector":
            continue  # which recorded
        if module and module.partition(".")[0] != "gymnasium":
            raise SpecRefusedError(f"its wrapper {entry_point[:80]!r} would run as code")
        arguments = wrapper.get("kwargs") or {}
        if not isinstance(arguments, dict):
            raise SpecRefusedError(f"the arguments of its wrapper {name[:40]} are no JSON object")
        found.append((name[:80], arguments))
    return found


def _beyond_registration(spec: Mapping[str, Any], registered: EnvSpec | None) -> Any:
    """The recorded wrappers without the innermost that are the registration's own: Gymnasium makes those."""
    listed, own = spec.get("additional_wrappers"), () if registered is None else registered.additional_wrappers
    if not own or not isinstance(listed, list):
        return listed
    recorded = [
        (wrapper.get("entry_point"), wrapper.get("kwargs") or {}) if isinstance(wrapper, dict) else None
        for wrapper in listed[: len(own)]
    ]
    if recorded != [(wrapper.entry_point, _as_json(wrapper.kwargs)) for wrapper in own]:
        raise SpecRefusedError(
            f"its wrappers are not those of the registration here ({', '.join(wrapper.name for wrapper in own)})"
        )
    return listed[len(own) :]


def _as_json(kwargs: Any) -> Any:
    """As a record has them: tuples are lists there. What JSON does not hold, no record is equal to."""
    try:
        return json.loads(json.dumps(kwargs or {}))
    except (TypeError, ValueError):
        return None


def _check_frames(kwargs: Mapping[str, Any], wrappers: list[tuple[str, dict[str, Any]]]) -> None:
    frames = 1
    for arguments in (kwargs, *(arguments for name, arguments in wrappers if name in PURE)):
        for key, value in arguments.items():
            if isinstance(value, int) and ("skip" in key or "repeat" in key):
                frames *= max(1, abs(value))
    if frames > _MOST_COUNT:
        raise SpecRefusedError(f"its frames and repetitions multiply to {frames:,} a step, more than {_MOST_COUNT:,}")


def _check_kwargs(whose: str, kwargs: Any) -> None:
    if not isinstance(kwargs, dict):
        raise SpecRefusedError(f"{whose} arguments are no JSON object")
    waiting: list[Any] = list(kwargs.items())
    leaves = 0
    while waiting:
        key, value = waiting.pop()
        leaves += 1
        if leaves > _MOST_LEAVES:
            raise SpecRefusedError(f"{whose} arguments have more than {_MOST_LEAVES:,} values")
        if isinstance(value, int) and abs(value) > (_MOST_COUNT if "skip" in str(key) else _MOST_STEPS):
            raise SpecRefusedError(f"{whose} argument {str(key)[:40]} is {value}, which is too large")
        if isinstance(value, dict):
            waiting += [(key, child) for child in value.values()]
        elif isinstance(value, list):
            waiting += [(key, child) for child in value]
        elif isinstance(value, str) and (value.startswith((".", "~")) or any(c in value for c in "/\\:")):
            raise SpecRefusedError(f"{whose} argument {str(key)[:40]} is the path {value[:80]!r}")
