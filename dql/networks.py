"""The denoiser and the twin critic. Parameter names are the published code's, so its checkpoints load unchanged.

Each network's parameters are views into one flat buffer (`FlatModule.flat`), laid out as `dql.kernels.layout` says: the
optimiser, the gradient norm, EMA and the target update are one elementwise pass each, and a kernel takes one pointer.
"""

import contextlib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from dql.backend.kept import Kept
from dql.kernels.cpp import binding
from dql.kernels.layout import ACTIVATIONS, CriticSpec, DenoiserSpec, FlatLayout
from dql.kernels.reference import activation_bwd, activation_fwd, time_embedding
from dql.shown import shown
from dql.tensors import LOWEST_ADDRESS, has_memory, plain, transforming, unseen

Tensor = torch.Tensor
LARGEST_SIZE = 1 << 16  # of a layer, of states and actions: beyond, it is a mistake that takes gigabytes
_intact = binding.intact if binding.unavailable() is None else None


class _ActivationFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, kind: str) -> Tensor:
        h, saved = activation_fwd(z, kind, save=True)
        ctx.save_for_backward(saved, z)  # z is for second derivatives
        ctx.kind = kind
        return h

    @staticmethod
    def backward(ctx: Any, d_h: Tensor) -> tuple[Tensor, None]:
        saved, z = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph: by operators that torch differentiates again
            return _differentiable_bwd(d_h, z, ctx.kind), None
        return activation_bwd(d_h, saved, ctx.kind), None


def _differentiable_bwd(d_h: Tensor, z: Tensor, kind: str) -> Tensor:
    """`activation_bwd` by operators that torch can differentiate in turn."""
    if kind == "relu":
        return torch.ops.aten.threshold_backward(d_h, z, 0)
    s = torch.sigmoid(z)
    if kind == "silu":
        return d_h * (s + z * s * (1 - s))
    w = torch.tanh(F.softplus(z))
    return d_h * (w + z * s * (1 - w * w))


class Activation(nn.Module):
    """mish, relu or silu, with the kernels' own forward and backward (the same values as everywhere else)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        if kind not in ACTIVATIONS:
            raise ValueError(f"unknown activation {shown(kind)}; known: {', '.join(ACTIVATIONS)}")
        self.kind = kind

    def forward(self, z: Tensor) -> Tensor:
        if torch.is_grad_enabled() and z.requires_grad:
            return _ActivationFunction.apply(z, self.kind)
        return activation_fwd(z, self.kind)[0]

    def extra_repr(self) -> str:
        return self.kind


class FlatModule(nn.Module):
    """A module whose parameters are views into one flat buffer.

    It is shared between processes as any module is: handed to a process (by `torch.multiprocessing`, or after
    `share_memory()`), both see what either writes into parameters or `flat`. Gradients are each process's own.

    Attributes:
        flat: [P] the buffer, a leaf whose `.grad` [P] the parameters' `.grad` are views of. An optimizer takes either
            it, `torch.optim.Adam([module.flat])`, or `module.parameters()`.
        buffer: `flat`, detached: the same memory and version counter.
        weights: the parameters by name, detached; for code that computes its own gradients.
        kept: what backends derive from the module and keep with it, such as packed weights.
    """

    spec: Any  # a DenoiserSpec or a CriticSpec, as the subclass says
    layout: FlatLayout
    flat: nn.Parameter
    buffer: Tensor
    weights: dict[str, Tensor]
    kept: Kept
    _places: tuple[
        tuple[dict[str, Any], str, int], ...
    ]  # of each slot: its owner's parameters, its name there, its offset
    _tree: tuple[
        tuple[dict[str, Any], str, nn.Module], ...
    ]  # of each submodule: its parent's children, its name, itself
    _gradients: Tensor  # the buffer that the parameters' gradients are views of

    def flatten_parameters(self) -> None:
        """Moves the parameters into a fresh flat buffer (at the start, and whenever torch replaced them).

        Optimizers made before hold the old parameters: make them anew.
        """
        parameters = dict(self.named_parameters())
        first = next(iter(parameters.values()))
        buffer = torch.zeros(self.layout.size, dtype=first.dtype, device=first.device)
        for name, view in self.layout.views(buffer).items():
            view.copy_(parameters[name].detach())
        self._adopt(buffer)

    def move_into(self, buffer: Tensor) -> None:
        """Moves the parameters into `buffer` [P], which holds their values and stays theirs.

        Optimizers made before hold the old parameters, as after `flatten_parameters`.
        """
        self._adopt(buffer)

    def _shared_buffer(self) -> Tensor | None:
        """The flat buffer that the parameters are views of already, if it is in memory shared with other processes."""
        parameters = dict(self.named_parameters())
        first, slot = parameters.get(self.layout.slots[0].name), self.layout.slots[0]
        if first is None or not first.is_shared() or not first.is_contiguous():
            return None
        start = first.storage_offset() - slot.offset
        if start < 0 or (start + self.layout.size) * first.element_size() > first.untyped_storage().nbytes():
            return None
        buffer = torch.empty(0, dtype=first.dtype, device=first.device)
        buffer.set_(first.untyped_storage(), start, (self.layout.size,), (1,))
        for name, view in self.layout.views(buffer).items():
            held = parameters.get(name)
            if held is None or held.data_ptr() != view.data_ptr() or held.shape != view.shape:
                return None
        return buffer

    def _adopt(self, buffer: Tensor) -> None:
        """Makes the parameters views of `buffer`, which holds their values."""
        parameters = dict(self.named_parameters())
        flat = nn.Parameter(buffer)
        detached = flat.detach()
        places, views = [], self.layout.views(detached)  # one version counter for all
        for name, view in views.items():
            owner, _, leaf = name.rpartition(".")
            module = self.get_submodule(owner)
            setattr(module, leaf, nn.Parameter(view, requires_grad=parameters[name].requires_grad))
            offset = view.storage_offset() - buffer.storage_offset()
            places.append((module._parameters, leaf, offset * view.element_size()))
        tree = [(m._modules, name, child) for m in self.modules() for name, child in m._modules.items() if child]
        # Outside the registered parameters: state_dict() and parameters() keep the published names alone.
        for attribute, value in (
            ("flat", flat),
            ("buffer", detached),
            ("weights", views),
            ("kept", Kept()),
            ("_places", tuple(places)),
            ("_tree", tuple(tree)),
            ("_gradients", torch.zeros_like(flat.detach())),
        ):
            object.__setattr__(self, attribute, value)
        self.flat.grad = self._gradients
        for name, view in self.layout.views(self._gradients).items():
            self.get_parameter(name).grad = view

    def flat_parameters(self) -> list[nn.Parameter]:
        """The parameters in the layout's order, each known to be a view of `flat`.

        Raises:
            RuntimeError: one was taken out of the buffer, or a layer was replaced, which a kernel would not notice.
            TypeError, ValueError: the buffer has no memory (it is fake, on the meta device, or was freed).
        """
        base = self._address()
        if _intact is not None and _intact(self._places, self._tree, base):
            return [owner[leaf] for owner, leaf, _ in self._places]
        for siblings, name, module in self._tree:
            if siblings.get(name) is not module:
                raise RuntimeError(
                    f"layer {name!r} of {type(self).__name__} was replaced, which the kernels cannot follow: write its "
                    "values into the old layer's parameters (with torch.no_grad(): parameter.copy_(...))"
                )
        parameters = [owner.get(leaf) for owner, leaf, _ in self._places]
        for slot, parameter, (_, _, offset) in zip(self.layout.slots, parameters, self._places, strict=True):
            if not _lies_at(parameter, base + offset):
                if self._follow_dictionaries():
                    return self.flat_parameters()
                raise RuntimeError(
                    f"parameter {slot.name!r} was replaced and is no view of the flat buffer any more: write into it "
                    "(with torch.no_grad(): parameter.copy_(...)), or call flatten_parameters() and make its optimizer "
                    "anew"
                )
        return parameters  # type: ignore[return-value]

    def _follow_dictionaries(self) -> bool:
        """Looks for the parameters where their modules have them now; whether that is elsewhere. torch.export leaves
        modules another dictionary, and in the old one stand-ins."""
        places = []
        for slot, (_, leaf, offset) in zip(self.layout.slots, self._places, strict=True):
            places.append((self.get_submodule(slot.name.rpartition(".")[0])._parameters, leaf, offset))
        if all(new[0] is old[0] for new, old in zip(places, self._places, strict=True)):
            return False
        object.__setattr__(self, "_places", tuple(places))
        return True

    def _address(self) -> int:
        """Where the buffer lies; raises TypeError or ValueError if that is nowhere."""
        try:
            address = self.flat.data_ptr()
        except RuntimeError:  # torch's, of tensors that are none
            address = 0
        if address < LOWEST_ADDRESS:
            plain(f"the parameters of this {type(self).__name__}", self.flat)
        return address

    def gradient_leaves(self, at_once: bool) -> list[nn.Parameter]:
        """What a backward pass gives a gradient: the parameters, or `flat` in their stead if all of them want one.

        Args:
            at_once: for who calls `backward`: one addition to `flat.grad` then, instead of one for each parameter.

        Raises:
            RuntimeError: as `flat_parameters`.
        """
        parameters = self.flat_parameters()
        return [self.flat] if at_once and all(p.requires_grad for p in parameters) else parameters

    def check_intact(self) -> None:
        """`flat_parameters` for who needs no list: in one native call, if there is one.

        Raises:
            RuntimeError: as `flat_parameters`.
        """
        if _intact is None or not _intact(self._places, self._tree, self._address()):
            self.flat_parameters()

    def places(self, held: list[tuple[dict[str, Any], str, Any]]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """What `dql.kernels.cpp.binding.intact` compares: where the parameters are, and the submodules together with
        `held`."""
        return self._places, (*self._tree, *held)

    def attach_gradients(self) -> None:
        """Makes the parameters' gradients views of `flat.grad` again, if an optimizer's zero_grad() undid that.

        A gradient that is None is zero; one that autograd made on its own is copied into its place.
        """
        gradients = self.flat.grad
        base = None if gradients is None else gradients.data_ptr()
        held = [owner[leaf].grad for owner, leaf, _ in self._places]
        if base is not None:
            for g, (_, _, offset) in zip(held, self._places, strict=True):
                if g is None or g.data_ptr() != base + offset:
                    break
            else:
                return
        old = self._gradients.data_ptr()
        if gradients is None or gradients.shape != self.flat.shape or not gradients.is_contiguous():
            gradients = self.flat.grad = torch.zeros_like(self.flat)
        views = self.layout.views(gradients).values()
        for g, (owner, leaf, offset), view in zip(held, self._places, views, strict=True):
            if g is None:
                view.zero_()
            elif g.data_ptr() not in (old + offset, view.data_ptr()):
                view.copy_(g.detach())  # of a backward pass with create_graph it may have a history
            owner[leaf].grad = view
        object.__setattr__(self, "_gradients", gradients)

    def zero_grad(self, set_to_none: bool = False) -> None:
        """Zeroes the flat gradient; the parameters' gradients stay views of it whatever `set_to_none` says."""
        self.attach_gradients()
        assert self.flat.grad is not None
        self.flat.grad.zero_()

    def _apply(self, fn: Any, recurse: bool = True) -> "FlatModule":
        super()._apply(fn, recurse)
        base = self.flat.data_ptr()
        if any(owner[leaf].data_ptr() != base + offset for owner, leaf, offset in self._places):
            self.flatten_parameters()  # torch moved or cast the parameters one by one
        return self

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As torch's, but what does not fit is refused in one sentence, and then nothing was loaded.

        Raises:
            RuntimeError: keys are missing or unknown, or shapes differ.
            TypeError, ValueError: a value is no tensor with memory; assign=True.
        """
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict, assign)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        for derived in ("flat", "buffer", "weights", "kept", "_places", "_tree", "_gradients"):
            state.pop(derived, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Another process's module that it shares: torch rebuilt the parameters in that memory, and there they stay.
        buffer = self._shared_buffer()
        if buffer is None:
            self.flatten_parameters()
        else:
            self._adopt(buffer)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if local_metadata.get("assign_to_params_buffers"):
            raise ValueError(
                "load_state_dict(assign=True) would take the parameters out of their flat buffer; leave assign out"
            )
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)


@contextlib.contextmanager
def frozen(module: FlatModule) -> Iterator[None]:
    """Gradients pass through the module to its inputs, but none is computed for its parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def _lies_at(parameter: Tensor | None, address: int) -> bool:
    try:
        return parameter is not None and parameter.data_ptr() == address
    except RuntimeError:  # torch's, of tensors that have no address
        return False


def leaf_gradients(layout: FlatLayout, d_flat: Tensor | None, need: Sequence[bool]) -> Iterator[Tensor | None]:
    """The gradient of each of `FlatModule.gradient_leaves`, where it is needed."""
    if d_flat is None or len(need) == 1:
        yield from (d_flat if needed else None for needed in need)
        return
    views = layout.views(d_flat)
    yield from (views[slot.name] if needed else None for slot, needed in zip(layout.slots, need, strict=True))


def checked_sizes(**sizes: Any) -> list[int]:
    """The sizes as ints, NumPy's integers among them."""
    for name, value in sizes.items():
        whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not whole or not 1 <= value <= LARGEST_SIZE:
            raise ValueError(f"{name} must be an integer from 1 to {LARGEST_SIZE:,}, got {shown(value)}")
    return [int(value) for value in sizes.values()]


class TimeEmbedding(nn.Module):
    """Sinusoidal embedding of the timestep: [...] -> [..., dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, t: Tensor) -> Tensor:
        return time_embedding(t, self.dim)


class Denoiser(FlatModule):
    """eps(x, t, s): concat [x, time_mlp(t), s] -> hidden_dim x num_hidden (Mish) -> action_dim.

    Args:
        state_dim: S.
        action_dim: A.
        hidden_dim: H; the paper's is 256.
        num_hidden: hidden layers; the paper's is 3.
        time_dim: size of the time embedding, even; the paper's is 16.
        activation: "mish" (the paper's), "relu" or "silu".
        generator: of the initial weights, a CPU generator; None draws from torch's own, as every nn.Module does.

    Raises:
        ValueError: a size that is no positive integer, an odd time_dim, an unknown activation.
    """

    spec: DenoiserSpec

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        num_hidden: int = 3,
        time_dim: int = 16,
        activation: str = "mish",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        state_dim, action_dim, hidden_dim, num_hidden, time_dim = checked_sizes(
            state_dim=state_dim, action_dim=action_dim, hidden_dim=hidden_dim, num_hidden=num_hidden, time_dim=time_dim
        )
        if time_dim < 4 or time_dim % 2:
            raise ValueError(f"time_dim must be even (half sines, half cosines) and at least 4, got {time_dim}")
        self.spec = DenoiserSpec(state_dim, action_dim, hidden_dim, num_hidden, time_dim, activation)
        self.layout = self.spec.layout
        self.time_mlp = nn.Sequential(
            TimeEmbedding(time_dim),
            linear(time_dim, 2 * time_dim, generator),
            Activation(activation),
            linear(2 * time_dim, time_dim, generator),
        )
        inputs = action_dim + time_dim + state_dim
        self.mid_layer = hidden_layers(inputs, hidden_dim, num_hidden, activation, generator)
        self.final_layer = linear(hidden_dim, action_dim, generator)
        self.flatten_parameters()

    def forward(self, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """The predicted noise (or x_0, for a policy with predict_epsilon=False).

        Args:
            x: noisy actions [B, A].
            t: timesteps [B], integers or floats of 0 .. T - 1.
            states: [B, S].

        Returns:
            [B, A].
        """
        if torch.is_grad_enabled():
            self.attach_gradients()
        features = self.time_mlp(t.to(x.dtype))  # [B, D]
        return self.final_layer(self.mid_layer(torch.cat([x, features, states], dim=1)))


class TwinCritic(FlatModule):
    """Two independent Q functions: concat [state, action] -> hidden_dim x num_hidden (Mish) -> 1.

    Args:
        state_dim: S.
        action_dim: A.
        hidden_dim: H; the paper's is 256.
        num_hidden: hidden layers; the paper's is 3.
        activation: "mish" (the paper's), "relu" or "silu".
        generator: of the initial weights, a CPU generator; None draws from torch's own, as every nn.Module does.

    Raises:
        ValueError: a size that is no positive integer, an unknown activation.
    """

    spec: CriticSpec

    def __init__(
        self,
        state_dim: int,
        action_dim: int,
        hidden_dim: int = 256,
        num_hidden: int = 3,
        activation: str = "mish",
        *,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        state_dim, action_dim, hidden_dim, num_hidden = checked_sizes(
            state_dim=state_dim, action_dim=action_dim, hidden_dim=hidden_dim, num_hidden=num_hidden
        )
        self.spec = CriticSpec(state_dim, action_dim, hidden_dim, num_hidden, activation)
        self.layout = self.spec.layout

        def q_model() -> nn.Sequential:
            hidden = hidden_layers(state_dim + action_dim, hidden_dim, num_hidden, activation, generator)
            return nn.Sequential(*hidden, linear(hidden_dim, 1, generator))

        self.q1_model = q_model()
        self.q2_model = q_model()
        self.flatten_parameters()

    @classmethod
    def from_published(cls, state_dict: dict[str, Tensor], action_dim: int) -> "TwinCritic":
        """A critic of the authors' repository: the state_dict that its `critic*.pth` holds.

        Args:
            state_dict: with the keys `q1_model.{0,2,4,6}.*` and `q2_model.*`.
            action_dim: A; the file knows only S + A.

        Raises:
            ValueError: naming the keys that are missing, unknown or of the wrong shape.
        """
        check_published(state_dict, "critic", {"q1_model.0.weight": 2})
        first = state_dict["q1_model.0.weight"]
        if isinstance(action_dim, bool) or not isinstance(action_dim, numbers.Integral):
            raise TypeError(f"action_dim must be an integer, got {shown(action_dim)}")
        if not 1 <= action_dim < first.shape[1]:
            raise ValueError(
                f"action_dim must be from 1 to below the critic's {first.shape[1]} inputs, got {action_dim}"
            )
        num_hidden = sum(k.startswith("q1_model.") and k.endswith(".weight") for k in state_dict) - 1
        critic = cls(first.shape[1] - action_dim, action_dim, first.shape[0], num_hidden)
        load_published(critic, state_dict, "critic")
        return critic

    def q(self, i: int, states: Tensor, actions: Tensor) -> Tensor:
        """Q_i of states [B, S] and actions [B, A] -> [B], or actions [B, N, A] -> [B, N]; i is 1 or 2.

        With N candidates the state's part of the first layer is computed once a state.

        Raises:
            ValueError: i is another number, or an input does not fit the critics.
            TypeError: an input is no tensor.
        """
        if isinstance(i, bool) or i not in (1, 2):
            raise ValueError(f"there are Q_1 and Q_2: i must be 1 or 2, got {shown(i)}")
        self.check_inputs(states, actions)
        if torch.is_grad_enabled():
            self.attach_gradients()
        model: nn.Sequential = self.q1_model if i == 1 else self.q2_model
        if actions.dim() == 2:
            return model(torch.cat([states, actions], dim=1)).squeeze(-1)
        first = model[0]
        assert isinstance(first, nn.Linear)
        S = states.shape[1]
        state_part = F.linear(states, first.weight[:, :S], first.bias)  # [B, H]
        z = F.linear(actions, first.weight[:, S:]) + state_part[:, None]  # [B, N, H]
        return model[1:](z).squeeze(-1)

    def forward(self, states: Tensor, actions: Tensor) -> tuple[Tensor, Tensor]:
        """(Q_1, Q_2), each [B] for actions [B, A] and [B, N] for actions [B, N, A]."""
        return self.q(1, states, actions), self.q(2, states, actions)

    def check_inputs(self, states: Tensor, actions: Tensor) -> None:
        """Refuses what no critic can be asked about.

        Raises:
            TypeError: an input is no tensor.
            ValueError: a shape, dtype or device that does not fit, or memory that was freed.
        """
        S, A, flat = self.spec.state_dim, self.spec.action_dim, self.flat
        for name, tensor in (("states", states), ("actions", actions)):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}; use torch.as_tensor")
            if tensor.is_nested or tensor.layout is not torch.strided:
                plain(name, tensor)  # says so
            if tensor.dtype is not flat.dtype or tensor.device != flat.device:
                raise ValueError(
                    f"{name} are {tensor.dtype} on {tensor.device}, the critic is {flat.dtype} on {flat.device}; "
                    "convert one of them"
                )
        given, B = [list(states.shape), list(actions.shape)], states.shape[:1]
        if states.dim() != 2 or states.shape[1] != S or actions.dim() not in (2, 3) or actions.shape[-1] != A:
            raise ValueError(f"a critic takes states [B, {S}] and actions [B, {A}] or [B, N, {A}], got {given}")
        if actions.shape[:1] != B:
            raise ValueError(f"a critic takes as many states as actions (or groups of candidates), got {given}")
        if torch.compiler.is_compiling() or transforming() or unseen():
            return  # what torch traces or transforms has no memory to look at
        for name, tensor in (("states", states), ("actions", actions), ("the critic's parameters", flat)):
            if type(tensor) in (Tensor, nn.Parameter) and tensor.device.type != "meta" and not has_memory(tensor):
                plain(name, tensor, whole=True)  # says so

    def q_min(self, states: Tensor, actions: Tensor) -> Tensor:
        """min(Q_1, Q_2), the pessimistic value: [B] or [B, N]."""
        return torch.minimum(*self(states, actions))


def check_state_dict(module: nn.Module, state_dict: Any, strict: bool = True) -> None:
    """Refuses a state_dict that is not this module's before any of it is loaded.

    Raises:
        RuntimeError: keys are missing or unknown (unless not `strict`), or shapes differ: torch's exception for that.
        TypeError, ValueError: it is no dictionary of tensors with memory.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"load_state_dict takes a state_dict, got {type(state_dict).__name__}; use module.state_dict()")
    own = module.state_dict()
    what = type(module).__name__
    missing, unknown = sorted(own.keys() - state_dict.keys()), sorted(state_dict.keys() - own.keys(), key=str)
    if strict and (missing or unknown):
        kinds = [f"{len(names)} keys {kind} (the first is {names[0]!r})" for names, kind in
                 ((missing, "are missing"), (unknown, "are unknown")) if names]  # fmt: skip
        raise RuntimeError(
            f"this is no state_dict of such a {what}: {' and '.join(kinds)}; nothing was loaded, make it with "
            "state_dict() of one with the same sizes"
        )
    for name in own.keys() & state_dict.keys():
        given = plain(f"the values of {name!r}", state_dict[name], whole=True)
        if given.is_complex():
            raise TypeError(f"the values of {name!r} are {given.dtype}, which would lose a part; give real ones")
        if given.shape != own[name].shape:
            raise RuntimeError(
                f"this is no state_dict of such a {what}: {name!r} is {list(given.shape)}, expected "
                f"{list(own[name].shape)}; nothing was loaded, make a {what} with the same sizes"
            )


def check_file_sizes(
    tensors: Mapping[str, Tensor], prefix: str, state_dim: Any, action_dim: Any, hidden_dim: Any, num_hidden: Any
) -> None:
    """Compares the sizes that a file names of its denoiser with those of its tensors, before memory is taken for them.

    Raises:
        ValueError: they differ. KeyError, IndexError: a tensor is missing, or has another number of dimensions.
    """
    own = f"{prefix}mid_layer."
    widths = [len(t) for name, t in tensors.items() if name.startswith(own) and name.endswith(".bias")]
    A = len(tensors[f"{prefix}final_layer.bias"])
    S = tensors[f"{own}0.weight"].shape[1] - A - len(tensors[f"{prefix}time_mlp.3.bias"])
    held, named = (S, A, *widths), (state_dim, action_dim, hidden_dim, num_hidden)
    if not isinstance(num_hidden, int) or held != (state_dim, action_dim, *[hidden_dim] * min(num_hidden, 1000)):
        raise ValueError(f"its networks' sizes {held} are not those that it names, {shown(named)}")


def check_finite(module: FlatModule, what: str) -> None:
    """Refuses parameters that are not finite.

    Raises:
        ValueError: naming the first.
    """
    if bool(module.buffer.isfinite().all()):
        return
    name = next(name for name, weight in module.weights.items() if not bool(weight.isfinite().all()))
    raise ValueError(
        f"parameter {name!r} of {what} holds NaN or infinite values, as after a training that diverged; take a "
        "checkpoint from before that"
    )


def linear(inputs: int, outputs: int, generator: torch.Generator | None) -> nn.Linear:
    """nn.Linear with its own initial weights, drawn from `generator`: the same numbers as torch's from that state."""
    if generator is None:
        return nn.Linear(inputs, outputs)
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device="cpu")  # built without drawing
    with torch.no_grad():
        nn.init.kaiming_uniform_(layer.weight, a=math.sqrt(5), generator=generator)
        bound = 1 / math.sqrt(inputs)
        layer.bias.uniform_(-bound, bound, generator=generator)
    return layer


def hidden_layers(
    inputs: int, hidden_dim: int, num_hidden: int, activation: str, generator: torch.Generator | None
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(num_hidden):
        layers += [linear(inputs, hidden_dim, generator), Activation(activation)]
        inputs = hidden_dim
    return nn.Sequential(*layers)


def check_published(state_dict: Any, what: str, needed: dict[str, int]) -> None:
    """Refuses what is no state_dict of a published network, before its sizes are read from it.

    Args:
        state_dict: what was given.
        what: of the published networks it is to be.
        needed: how many dimensions the tensors have that its sizes are read from.

    Raises:
        TypeError: it is no dictionary of tensors. ValueError: one is missing, or has other dimensions.
    """
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"from_published takes the state_dict of a published {what}, got {shown(state_dict)}; use torch.load(path, "
            "weights_only=True)"
        )
    for key, value in state_dict.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise TypeError(f"not a published {what}: its {shown(key)} is {shown(value)}, no tensor under a name")
        plain(f"the values of {key!r}", value, whole=True)
    for key, dimensions in needed.items():
        if key not in state_dict:
            raise ValueError(f"not a published {what}: the state_dict has no {key!r}")
        if state_dict[key].dim() != dimensions:
            raise ValueError(
                f"not a published {what}: {key!r} is {list(state_dict[key].shape)}, expected {dimensions} dimensions"
            )


def load_published(module: FlatModule, state_dict: dict[str, Tensor], what: str) -> None:
    """Copies a published network's tensors into `module`.

    Raises:
        ValueError: a key is missing or unknown, a shape does not fit, or a parameter is not finite; the sentence names
            the first of each.
    """
    own = module.state_dict()
    missing = sorted(own.keys() - state_dict.keys())
    unknown = sorted(state_dict.keys() - own.keys())
    if missing or unknown:
        raise ValueError(
            f"not a published {what}: "
            + " and ".join(
                f"{len(names)} {kind} key{'s' * (len(names) > 1)} ({names[0]!r}, ...)"
                for kind, names in (("missing", missing), ("unknown", unknown))
                if names
            )
        )
    for name, tensor in own.items():
        if tensor.shape != state_dict[name].shape:
            raise ValueError(
                f"not a published {what} of this size: {name!r} is {list(state_dict[name].shape)}, "
                f"expected {list(tensor.shape)}"
            )
    module.load_state_dict(state_dict)
    check_finite(module, f"this {what}")
