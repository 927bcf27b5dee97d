"""Read one setting of a network from whatever holds it: a module, a state dict, a weights file, a flat tensor, a Point."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .checks import refusal
from .errors import OrographWarning
from .layout import Layout
from .restoring import locked, restoring, under
from .results import Point
from .state import Slots, find_slots
from .surroundings import normal_tensors

NESTED = ("state_dict", "model_state_dict", "model")  # where training frameworks keep the weights inside a checkpoint
PREFIXES = ("module.", "_orig_mod.")  # DistributedDataParallel, torch.compile


def snapshot_point(slots: Slots, layout: Layout, *, device: torch.device | None, dtype: torch.dtype | None, label: str) -> Point:
    """A copy of the model's present parameters and buffers."""
    present = slots.present()

    @under(normal_tensors)
    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().to(device=device, dtype=dtype if tensor.is_floating_point() else None)

    selected = [present[name] for name in layout.names]
    wide = torch.float32  # theta is kept, and all linear algebra done, in float32 or better
    for tensor in selected:
        wide = torch.promote_types(wide, dtype or tensor.dtype)
    like = selected[0].detach().new_empty(0, dtype=wide, device=device)
    theta = layout.flatten([own(tensor).to(like.device) for tensor in selected], like)
    frozen = {name: own(present[name]) for name in slots.parameters if name not in layout.names}
    point = Point(theta=theta, buffers={name: own(present[name]) for name in slots.buffers}, frozen=frozen, label=label)
    return _checked(point, point, layout)


@under(locked)
def read_point(source: Any, own: Point, slots: Slots, layout: Layout, label: str | None) -> Point:
    """The setting of `source` for the network whose present setting is `own`; tensors are copied to own's device and dtype.

    Narrower floating-point types are widened without loss; where a wider one is rounded a warning says so; whole numbers, quantised, boolean and complex ones
    are refused where the network computes with floating-point weights.
    """
    if isinstance(source, Point):
        _checked(source, own, layout)
        return replace(copied(source, own), label=label or source.label)
    if isinstance(source, nn.Module):
        theirs = find_slots(source)
        present = theirs.present()
        present |= {name: present[canonical] for name, canonical in theirs.aliases.items()}
        return _from_state(present, own, slots, layout, label or type(source).__name__)
    if isinstance(source, Tensor):
        if source.shape != own.theta.shape:
            raise ValueError(f"a flat tensor for this objective has shape ({layout.size},), got {tuple(source.shape)}.")
        if source.is_meta or source.layout != torch.strided:
            raise refusal("point", "source", source, "a dense tensor of real numbers that has values.")
        if not source.is_floating_point():
            raise ValueError(f"a flat tensor for this objective needs floating-point entries, got {_short(source.dtype)}. Use tensor.to({own.theta.dtype}).")
        return _checked(replace(own, theta=source.detach().to(own.theta, copy=True), label=label or own.label), own, layout)
    if isinstance(source, (str, Path)):
        return _from_state(load_weights(source), own, slots, layout, label or Path(source).stem)
    if isinstance(source, Mapping):
        for key in NESTED:  # a checkpoint as training frameworks save it
            if isinstance(source.get(key), Mapping):
                return read_point(source[key], own, slots, layout, label)
        return _from_state(source, own, slots, layout, label or "state dict")
    raise TypeError(f"a point cannot be read from a {type(source).__name__}. Pass a Point, Objective, module, state dict, weights file or flat tensor.")


def copied(point: Point, like: Point) -> Point:
    """The same setting in tensors of its own, on the device and in the precision of `like`."""
    with restoring(normal_tensors):
        buffers = {name: tensor.detach().to(like.buffers[name], copy=True) for name, tensor in point.buffers.items()}
        frozen = {name: tensor.detach().to(like.frozen[name], copy=True) for name, tensor in point.frozen.items()}
        return replace(point, theta=point.theta.detach().to(like.theta, copy=True), buffers=buffers, frozen=frozen)


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file: safetensors, or what `torch.load(weights_only=True)` accepts. Nothing else is executed."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no weights file {path}. Give one that torch.save(model.state_dict(), path) or safetensors wrote.")
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path.name} holds more than tensors, and unpickling it could run any code. Where you trust it, convert it once: "
            "torch.save(model.state_dict(), 'weights.pt'), or safetensors.torch.save_file."
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch reads bytes as instructions: a file of something else raises anything
        raise ValueError(f"{path.name} is no weights file: {type(error).__name__} {str(error).splitlines()[0] if str(error) else ''}. Save one by torch.save(model.state_dict(), 'weights.pt').") from error
    for key in NESTED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{path.name} holds a {type(loaded).__name__}, not a state dict. Save model.state_dict().")
    return dict(loaded)


def differs_outside(point: Point, own: Point) -> str | None:
    """Name of the first parameter outside the study in which two points differ, or None."""
    for name, tensor in own.frozen.items():
        if tensor is not point.frozen[name] and not torch.equal(tensor, point.frozen[name]):
            return name
    return None


def _from_state(state: Mapping[str, Any], own: Point, slots: Slots, layout: Layout, label: str) -> Point:
    names = [*slots.aliases, *slots.buffers]
    for prefix in PREFIXES:
        if not any(name in state for name in names) and all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    groups = {canonical: [name for name, other in slots.aliases.items() if other == canonical] for canonical in slots.parameters}
    found: dict[str, Tensor] = {}
    missing = []
    for canonical, names in groups.items():
        given = [state[name] for name in names if name in state]
        if not given:
            missing.append(canonical)
            continue
        if any(not torch.equal(given[0], other) for other in given[1:]):
            raise ValueError(f"{' and '.join(names)} are tied in this model, but differ in the given weights.")
        found[canonical] = given[0]
    if missing:
        raise ValueError(f"the given weights lack {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}. They belong to another network; this one has {', '.join(layout.names[:5])} ...")
    unknown = [key for key, value in state.items() if isinstance(value, Tensor) and key not in slots.aliases and key not in slots.buffers]
    if unknown:
        raise ValueError(f"the given weights hold {', '.join(unknown[:5])}, which this network does not have.")
    own_parameters = dict(zip(layout.names, layout.split(own.theta), strict=True)) | dict(own.frozen)
    _check_types({**{name: state[name] for name in own.buffers if name in state}, **found}, {**own.buffers, **own_parameters})
    for name, tensor in found.items():
        if tensor.shape != own_parameters[name].shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the given weights, and {tuple(own_parameters[name].shape)} in this network.")
    theta = layout.flatten([found[name].to(own.theta.device) for name in layout.names], own.theta)
    lacking = [name for name, tensor in own.buffers.items() if name not in state and tensor.is_floating_point() and _persistent(name, slots)]
    if lacking:
        raise ValueError(f"the given weights lack the buffer {lacking[0]} (running statistics belong to a network). Pass model.state_dict(), not its parameters alone.")
    buffers = {name: _like(state.get(name, tensor), tensor, name) for name, tensor in own.buffers.items()}
    frozen = {name: _like(found[name], tensor, name) for name, tensor in own.frozen.items()}
    return _checked(Point(theta=theta, buffers=buffers, frozen=frozen, label=label), own, layout)


def _check_types(given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse what holds other numbers than the network computes with, and say where weights are rounded."""
    rounded = []
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__} in the given weights, not a tensor. Pass model.state_dict().")
        here = own[name]
        if not (here.is_floating_point() or here.is_complex()) or (here.is_complex() and tensor.is_complex()):
            continue
        if tensor.is_quantized or not tensor.is_floating_point():
            cure = "Save real weights" if tensor.is_complex() else "Turn quantised weights back into floating-point ones (dequantise the model, then save it)"
            raise ValueError(f"{name} is {_short(tensor.dtype)} in the given weights, and {_short(here.dtype)} in this network. {cure}.")
        theirs, ours = torch.finfo(tensor.dtype), torch.finfo(here.dtype)
        if (theirs.eps < ours.eps or theirs.max > ours.max) and not torch.equal(tensor.to(here.dtype).to(tensor.dtype), tensor):
            rounded.append(name)
    if rounded:
        first = rounded[0]
        more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
        warnings.warn(
            f"{first}{more} is {_short(given[first].dtype)} in the given weights, and rounded to the {_short(own[first].dtype)} of this network. Objective(..., dtype={given[first].dtype}) keeps it.",
            OrographWarning, stacklevel=4,
        )  # fmt: skip


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _persistent(name: str, slots: Slots) -> bool:
    """Whether a buffer is part of the model's state dict."""
    module, attribute = slots.buffers[name][0]
    return attribute not in module._non_persistent_buffers_set


def _like(tensor: Tensor, own: Tensor, name: str) -> Tensor:
    """A copy on own's device and dtype; own itself where nothing differs."""
    if tensor.shape != own.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the given weights, and {tuple(own.shape)} in this network.")
    moved = tensor.detach().to(own, copy=True)
    return own if torch.equal(moved, own) else moved


def _checked(point: Point, own: Point, layout: Layout) -> Point:
    """Refuse a point with the wrong size, or with NaN among its parameters."""
    if point.theta.shape != own.theta.shape or set(point.buffers) != set(own.buffers) or set(point.frozen) != set(own.frozen):
        raise ValueError(f"the point belongs to another network: it has {point.theta.numel()} entries, this objective {own.theta.numel()}.")
    if not bool(torch.isfinite(point.theta).all()):
        broken = [name for name, part in zip(layout.names, layout.split(point.theta), strict=True) if not bool(torch.isfinite(part).all())]
        raise ValueError(f"the weights hold NaN or inf, first in {broken[0]!r}. Nothing can be measured there: use weights from before they diverged.")
    return point
