"""One setting of a network that can be put into the user's model for as long as it is needed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from .errors import OrographError
from .kernels import plain_kernels
from .layout import Layout, select_layout
from .nesting import as_double
from .points import snapshot_point
from .results import Point
from .state import Mode, Slots, differentiable, find_slots, mode_set, rng_kept, swapped


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A Point with tensors of its own, and the model that they are put into. Training the model does not change it."""

    model: nn.Module
    slots: Slots
    layout: Layout
    mode: Mode
    dtype: torch.dtype | None  # asked for parameters and data; None: as they are
    dtypes: tuple[torch.dtype, ...]  # of the leaves
    modules: tuple[nn.Module, ...]  # of the model, as it was taken
    point: Point
    volatile: tuple[str, ...] = ()  # buffers that a forward writes to without an effect on the loss
    leaves: dict[str, Tensor] = field(init=False, repr=False)  # what autograd differentiates with respect to, in the order of theta
    frozen: dict[str, Tensor] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        with torch.inference_mode(False):
            parts = self.layout.split(self.point.theta)
            leaves = {name: nn.Parameter(part.to(dtype, copy=True)) for name, part, dtype in zip(self.layout.names, parts, self.dtypes, strict=True)}
        object.__setattr__(self, "leaves", leaves)
        object.__setattr__(self, "frozen", {name: nn.Parameter(tensor, requires_grad=False) for name, tensor in self.point.frozen.items()})

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model holds this snapshot's tensors, in the right mode; for forward *and* backward. Everything goes back at the end."""
        if tuple(self.model.modules()) != self.modules:
            raise OrographError("the model's modules have changed since this objective was made, so its weights no longer fit. Make a new Objective.")
        buffers = {name: tensor.clone() if name in self.volatile else tensor for name, tensor in self.point.buffers.items()}
        with (
            swapped(self.model, self.slots, {**self.leaves, **self.frozen, **buffers}),
            mode_set(self.model, self.mode),
            rng_kept(),
            differentiable(self.point.theta.device),
            plain_kernels(self.model, self.point.theta.device),
        ):
            yield

    def in_double(self) -> Snapshot:
        """The same point in float64."""
        buffers, frozen = as_double(dict(self.point.buffers)), as_double(dict(self.point.frozen))
        return replace(self, dtype=torch.float64, dtypes=(torch.float64,) * len(self.dtypes), point=replace(self.point, theta=self.point.theta.double(), buffers=buffers, frozen=frozen))

    def state_dict(self) -> dict[str, Any]:
        """What `model.state_dict()` would hold here, in the model's own precision."""
        own = self.model.state_dict()
        with self.applied():
            there = {name: value.detach().clone() if isinstance(value, Tensor) else value for name, value in self.model.state_dict().items()}
        return {name: value.to(own[name]) if isinstance(value, Tensor) else value for name, value in there.items()}

    def fingerprints(self) -> dict[str, str]:
        """Short hashes of the weights (buffers included) and of the parameter set."""
        weights = fingerprint([self.point.theta, *self.point.buffers.values(), *self.point.frozen.values()])
        names = repr([(name, tuple(shape)) for name, shape in zip(self.layout.names, self.layout.shapes, strict=True)])
        return {"weights": weights, "parameters": hashlib.sha256(names.encode()).hexdigest()[:16]}


def fingerprint(tensors: Iterable[Tensor]) -> str:
    """A short hash of the bytes of some tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def take_snapshot(model: nn.Module, params: str | Sequence[str] | None, mode: Mode, device: torch.device | None, dtype: torch.dtype | None) -> Snapshot:
    """A snapshot of the model as it is now."""
    slots = find_slots(model)
    parameters = {name: getattr(*places[0]) for name, places in slots.parameters.items()}
    layout = select_layout(parameters, slots.aliases, params)
    point = snapshot_point(slots, layout, device=device, dtype=dtype, label=type(model).__name__)
    dtypes = tuple(dtype or parameters[name].dtype for name in layout.names)
    return Snapshot(model, slots, layout, mode, dtype, dtypes, tuple(model.modules()), point)


def check_model(model: Any, mode: Any, dtype: Any) -> None:
    """TypeError or ValueError for what is no network, no mode or no precision."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nn.Module.")
    if isinstance(model, _Loss):
        raise TypeError(f"model is a {type(model).__name__}, which is a loss. The network comes first: Objective(model, criterion, data).")
    if mode not in ("eval", "batch"):
        raise ValueError(f'mode={mode!r}: choose "eval" (running statistics) or "batch" (BatchNorm on each batch\'s own statistics).')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype!r} needs a floating-point torch dtype, such as torch.float64.")
