"""One setting of a network that can be put into a model for as long as it is needed: into a private copy, or into the user's own."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .durable import fingerprint
from .errors import OrographError
from .kernels import plain_forwards, plain_kernels
from .layout import Layout, select_layout
from .nesting import as_double
from .points import snapshot_point
from .restoring import Step, Undo, locked, restoring, under
from .results import Point
from .state import Mode, Slots, find_slots, mode_set, replaced
from .surroundings import (
    callers_defaults,
    defaults_set,
    full_precision,
    gradients,
    mode_stacks_kept,
    no_anomaly_mode,
    no_cached_parametrizations,
    normal_tensors,
    random_states_kept,
    saved_tensors_unchanged,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Users:
    """The user's own module, as it was when the snapshot was taken."""

    model: nn.Module
    slots: Slots
    modules: tuple[nn.Module, ...]

    def check_modules(self) -> None:
        """OrographError where layers were added, removed or exchanged since then."""
        if tuple(self.model.modules()) != self.modules:
            raise OrographError("the model's modules have changed since this objective was made, so its weights no longer fit. Make a new Objective.")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A Point with tensors of its own, and the model that they are put into. Training the user's model does not change it.

    `model`: what is run, with its `slots`: a private copy of the user's module, or that module itself, and `isolation` says why
    `extras`: whatever else is called in a loss (the criterion, `forward`, metrics), since it may hold parts of the model
    """

    model: nn.Module
    slots: Slots
    layout: Layout
    mode: Mode
    dtype: torch.dtype | None  # asked for parameters and data; None: as they are
    dtypes: tuple[torch.dtype, ...]  # of the leaves
    users: Users
    point: Point
    defaults: tuple[torch.dtype, torch.device]  # precision and device of new tensors
    extras: tuple[Any, ...] = ()
    isolation: str = ""
    volatile: tuple[str, ...] = ()  # buffers that a forward writes to without an effect on the loss
    leaves: dict[str, Tensor] = field(init=False, repr=False)  # what autograd differentiates with respect to, in the order of theta
    frozen: dict[str, Tensor] = field(init=False, repr=False)

    @under(normal_tensors)
    def __post_init__(self) -> None:
        parts = self.layout.split(self.point.theta)
        leaves = {name: nn.Parameter(part.to(dtype, copy=True)) for name, part, dtype in zip(self.layout.names, parts, self.dtypes, strict=True)}
        object.__setattr__(self, "leaves", leaves)
        object.__setattr__(self, "frozen", {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self.point.frozen.items()})

    def applied(self, *, scratch: bool = False) -> restoring:
        """The model holds this snapshot's tensors, in the right mode; for forward *and* backward. Everything goes back at the end.

        `scratch`: it holds copies of the buffers, which a forward may write to.
        """
        device = self.point.theta.device
        thread: tuple[Step, ...] = (locked, random_states_kept, mode_stacks_kept, gradients(True), full_precision(device.type), saved_tensors_unchanged)
        process = (no_cached_parametrizations, no_anomaly_mode, defaults_set(*self.defaults), plain_kernels(device))
        return restoring(*thread, *process, lambda undo: self._put_in(scratch, undo), plain_forwards(self.model, device))

    def _put_in(self, scratch: bool, undo: list[Undo]) -> None:
        if self.model is self.users.model:
            self.users.check_modules()
        buffers = {name: tensor.clone() if scratch or name in self.volatile else tensor for name, tensor in self.point.buffers.items()}
        tensors = {**self.leaves, **self.frozen, **buffers}
        for name, users in self.users.slots.present().items():
            vars(tensors[name]).update(vars(users))  # what a forward may look for on a weight
        roots = (*self.model.modules(), *self.extras)
        replaced(roots, self.slots, tensors, spare=self.model is self.users.model)(undo)
        mode_set(self.model, self.mode)(undo)

    def in_double(self, extras: tuple[Any, ...]) -> Snapshot:
        """The same point in float64, with other `extras`."""
        buffers, frozen = as_double(dict(self.point.buffers)), as_double(dict(self.point.frozen))
        return replace(self, extras=(*self.extras, *extras), dtype=torch.float64, dtypes=(torch.float64,) * len(self.dtypes), point=replace(self.point, theta=self.point.theta.double(), buffers=buffers, frozen=frozen))

    @under(locked)
    def state_dict(self) -> dict[str, Any]:
        """What `model.state_dict()` would hold here, in the model's own precision."""
        own = self.users.model.state_dict()
        with self.applied():
            there = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in self.model.state_dict().items()}
        return {name: value.to(own[name]) if isinstance(value, Tensor) else value for name, value in there.items()}

    def fingerprints(self) -> dict[str, str]:
        """Short hashes of the weights (buffers included) and of the parameter set."""
        weights = fingerprint([self.point.theta, *self.point.buffers.values(), *self.point.frozen.values()])
        names = repr([(name, tuple(shape)) for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)])
        return {"weights": weights, "parameters": hashlib.sha256(names.encode()).hexdigest()[:16]}


def take_snapshot(model: nn.Module, params: str | Sequence[str] | None, mode: Mode, device: torch.device | None, dtype: torch.dtype | None) -> Snapshot:
    """A snapshot of the model as it is now."""
    slots = find_slots(model)
    parameters = {name: getattr(*places[0]) for name, places in slots.parameters.items()}
    layout = select_layout(parameters, slots.aliases, params)
    point = snapshot_point(slots, layout, device=device, dtype=dtype, label=type(model).__name__)
    dtypes = tuple(dtype or parameters[name].dtype for name in layout.names)
    users = Users(model, slots, tuple(model.modules()))
    return Snapshot(model, slots, layout, mode, dtype, dtypes, users, point, callers_defaults())


def check_model(model: nn.Module, dtype: torch.dtype | None) -> None:
    """TypeError for what is no network or no precision."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(f"model is, or holds, a {type(model).__name__} of torch.jit, whose weights cannot be exchanged. Pass the module that it was made from.")
    if isinstance(model, _Loss):
        raise TypeError(f"model is a {type(model).__name__}, which is a loss. The network comes first: Objective(model, criterion, data).")
    if dtype is not None and not dtype.is_floating_point:
        raise TypeError(f"dtype={dtype!r} needs a floating-point torch dtype, such as torch.float64.")
