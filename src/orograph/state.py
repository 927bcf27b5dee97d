"""What a module holds, and one place where that is replaced for a while and put back.

The module's Parameter and buffer *objects* are replaced by a snapshot's own, for forward and backward (activation checkpointing
recomputes the forward inside the backward), then the originals go back. Nothing is ever copied into a tensor that was there before: that would
break, or silently falsify, every autograd graph that is still pending on it.
"""

from __future__ import annotations

import enum
import functools
import io
import logging
import operator
import threading
import types
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

from .restoring import Step, Undo, random_state_kept

Mode = Literal["eval", "batch"]
Places = dict[str, list[tuple[nn.Module, str]]]  # canonical name -> every (module, attribute) that holds the tensor
MOST_OBJECTS, LONG = 100_000, 1000  # that one walk visits; entries of a long list


@dataclass(frozen=True)
class Slots:
    """Where a model keeps its parameters and buffers. Tied tensors have one canonical name (the first) and several places."""

    parameters: Places
    buffers: Places
    aliases: dict[str, str]  # every parameter name -> canonical name

    def present(self) -> dict[str, Tensor]:
        """The tensors that the model holds now, by canonical name: parameters, then buffers."""
        return {name: getattr(*places[0]) for table in (self.parameters, self.buffers) for name, places in table.items()}

    @property
    def tied(self) -> dict[str, list[str]]:
        """Canonical name -> its other names, for tied parameters."""
        others: dict[str, list[str]] = {}
        for name, canonical in self.aliases.items():
            if name != canonical:
                others.setdefault(canonical, []).append(name)
        return others


def find_slots(model: nn.Module) -> Slots:
    """Walk the modules of `model` and note every place of every parameter and buffer."""
    seen: dict[int, str] = {}
    parameters: Places = {}
    buffers: Places = {}
    aliases: dict[str, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for registry, places in ((module._parameters, parameters), (module._buffers, buffers)):
            for attribute, tensor in registry.items():
                if tensor is None:
                    continue
                name = f"{prefix}.{attribute}" if prefix else attribute
                canonical = seen.setdefault(id(tensor), name)
                place = (module, attribute)
                if place not in places.setdefault(canonical, []):
                    places[canonical].append(place)
                if places is parameters:
                    aliases[name] = canonical
    return Slots(parameters, buffers, aliases)


MAPPINGS = frozenset((dict, OrderedDict, defaultdict, Counter))
SEQUENCES = frozenset((list, set, deque))
PLAIN = frozenset(
    (
        *(int, float, bool, str, bytes, complex, type(None), type, slice, range, types.BuiltinFunctionType, types.ModuleType, weakref.ref),
        *(torch.dtype, torch.device, torch.Size, torch.Generator, Tensor, nn.Parameter, nn.Buffer, np.ndarray),
    )
)
FOREIGN = (Optimizer, LRScheduler, DataLoader, Dataset, Sampler, logging.Logger, io.IOBase, threading.Thread, enum.Enum)  # things that a module may hold, and that are no part of it


def containers(roots: Iterable[Any]) -> list[Any]:
    """Every dict, list, set, deque and closure cell that modules hold, at any depth: in their attributes, their hooks, and what functions close over.

    Objects of other classes are followed where a module holds them, not where a function closes over them: these may be anything.
    """
    found: list[Any] = []
    seen: set[int] = set()
    queue = [(root, True) for root in roots]
    while queue and len(seen) < MOST_OBJECTS:
        value, owned = queue.pop()
        kind = type(value)
        if id(value) in seen:
            continue
        seen.add(id(value))
        inside: Iterable[Any] = ()
        if kind in MAPPINGS or kind in SEQUENCES:
            found.append(value)
            inside = _worth_following(value) if value else ()
        elif isinstance(value, nn.Module):
            inside = (value.__dict__,)
        elif kind in LEADS_ON:
            owned = owned and kind is not types.FunctionType
            inside = LEADS_ON[kind](value)
            if kind is types.CellType:
                found.append(value)
        elif owned and not isinstance(value, FOREIGN) and type(getattr(value, "__dict__", None)) is dict:
            inside = (value.__dict__,)
        for part in inside:
            if type(part) not in PLAIN:
                queue.append((part, owned))
    return found


def _worth_following(holder: Any) -> Iterable[Any]:
    """The values of a container; none of a long one that begins with a plain one (a vocabulary, a history)."""
    values: Iterable[Any] = holder.values() if type(holder) in MAPPINGS else holder
    if len(holder) > LONG:
        first = type(next(iter(values)))
        if first in PLAIN and not issubclass(first, Tensor):
            return ()
    return values


def _cell(cell: types.CellType) -> tuple[Any, ...]:
    """What a closure cell holds; nothing yet, if it is assigned later."""
    try:
        return (cell.cell_contents,)
    except ValueError:
        return ()


LEADS_ON: dict[type, Callable[[Any], Iterable[Any]]] = {
    tuple: tuple,
    types.CellType: _cell,
    types.FunctionType: lambda function: (*(function.__closure__ or ()), *(function.__defaults__ or ()), function.__dict__),
    types.MethodType: lambda method: (method.__self__, method.__func__),
    functools.partial: lambda partial: (partial.func, partial.args, partial.keywords),
}


def contents_kept(*roots: Any) -> Step:
    """What modules hold, down to the entries of their lists and dicts, is afterwards what it was before: the same objects in the same order."""
    return lambda undo: _keep(containers(roots), undo)


def _keep(holders: list[Any], undo: list[Undo]) -> None:
    before = [(holder, _contents(holder)) for holder in holders if holder]
    streams = [undone for holder, _ in before for _, value in entries(holder) if (undone := random_state_kept(value))]
    empty = [holder for holder in holders if not holder]

    def put_back() -> None:
        for holder, contents in before:
            _put_back(holder, contents)
        for holder in filter(None, empty):
            holder.clear()
        for restore in streams:
            restore()

    undo.append(put_back)


def _contents(holder: Any) -> Any:
    if type(holder) is types.CellType:
        return _cell(holder)
    return dict(holder) if type(holder) in MAPPINGS else list(holder)


def _put_back(holder: Any, before: Any) -> None:
    """Make `holder` hold exactly the objects of `before`, in their order; what has not changed is not touched."""
    if type(holder) in MAPPINGS:
        _put_back_dict(holder, before)
    elif type(holder) is types.CellType:
        if before and (now := _cell(holder)) and now[0] is not before[0]:
            holder.cell_contents = before[0]
    elif len(holder) != len(before) or not all(map(operator.is_, holder, before)):
        if isinstance(holder, list):
            holder[:] = before
        else:
            holder.clear()
            (holder.update if isinstance(holder, set) else holder.extend)(before)


def _put_back_dict(holder: dict[Any, Any], before: dict[Any, Any]) -> None:
    if len(holder) == len(before) and all(map(operator.is_, holder, before)) and all(map(operator.is_, holder.values(), before.values())):
        return
    for key, value in before.items():
        if holder.get(key, holder) is not value:
            holder[key] = value
    for key in [key for key in holder if key not in before]:
        del holder[key]
    if not all(map(operator.is_, holder, before)):  # a key that was deleted has come back at the end
        holder.clear()
        holder.update(before)


def replaced(roots: Iterable[Any], slots: Slots, tensors: Mapping[str, Tensor], *, spare: bool = False) -> Step:
    """Wherever `roots` hold a parameter or buffer, in lists of weights too, they hold the one of `tensors` with its canonical name. All their contents are kept.

    `spare`: where they hold other tensors and arrays, they hold copies, so that a forward may write to them.
    """

    def step(undo: list[Undo]) -> None:
        new: dict[int, Any] = {
            id(getattr(module, attribute)): tensors[name]
            for table in (slots.parameters, slots.buffers)
            for name, places in table.items()
            for module, attribute in places
        }
        holders = containers(roots)
        _keep(holders, undo)
        if spare:
            new = _spares([value for holder in filter(None, holders) for _, value in entries(holder)]) | new
        for holder in filter(None, holders):
            renew_keys(holder, new)
            for key, value in entries(holder):
                if type(value) in PLAIN and not isinstance(value, Tensor | np.ndarray):
                    continue
                other = _renewed(value, new)
                if other is not value:
                    if type(holder) is types.CellType:
                        holder.cell_contents = other
                    else:
                        holder[key] = other

    return step


def entries(holder: Any) -> Iterator[tuple[Any, Any]]:
    """(key, value) of a container; there are none of a set, whose order is not known."""
    if type(holder) in MAPPINGS:
        yield from list(holder.items())
    elif not isinstance(holder, set | types.CellType):
        yield from enumerate(holder)
    elif type(holder) is types.CellType:
        yield from ((None, value) for value in _cell(holder))


def renew_keys(holder: Any, new: Mapping[int, Tensor]) -> None:
    """A dict whose keys are weights, or their `id`, has those of `new` instead, in the same order."""
    if type(holder) not in MAPPINGS or not any(isinstance(key, Tensor) or (type(key) is int and key in new) for key in holder):
        return
    renewed = {}
    for key, value in holder.items():
        weight = new.get(key if type(key) is int else id(key))
        renewed[key if weight is None else id(weight) if type(key) is int else weight] = value
    if any(key not in holder for key in renewed):
        holder.clear()
        holder.update(renewed)


def _spares(values: Iterable[Any]) -> dict[int, Any]:
    """Copies of every array and tensor that is no result of autograd, by id; views of the same numbers stay views of the same."""
    found: dict[int, Any] = {}
    storages: dict[int, Any] = {}
    queue = list(values)
    while queue:
        value = queue.pop()
        if type(value) is tuple:
            queue.extend(value)
        elif isinstance(value, np.ndarray):
            found[id(value)] = value.copy()
        elif type(value) is Tensor and not value.requires_grad and value.layout == torch.strided and not value.is_nested and value.device.type != "meta":
            storage = value.untyped_storage()
            if storage.data_ptr() not in storages:
                storages[storage.data_ptr()] = storage.clone()
            own = storages[storage.data_ptr()]
            found[id(value)] = torch.empty(0, dtype=value.dtype, device=value.device).set_(own, value.storage_offset(), value.shape, value.stride())
    return found


def _renewed(value: Any, new: Mapping[int, Any]) -> Any:
    """`value`, or what stands for it; a tuple of weights becomes another tuple."""
    if isinstance(value, Tensor | np.ndarray):
        return new.get(id(value), value)
    if type(value) is tuple:
        parts = tuple(_renewed(part, new) for part in value)
        return parts if any(part is not old for part, old in zip(parts, value, strict=True)) else value
    return value


def mode_set(model: nn.Module, mode: Mode) -> Step:
    """Every module in eval mode; with mode="batch" only BatchNorm uses the batch's own statistics and updates none. After `contents_kept`."""

    def step(undo: list[Undo]) -> None:
        for module in model.modules():
            if module.training:
                module.training = False  # the attribute, not .eval(): some modules rewrite their weights there
            if mode == "batch" and isinstance(module, _BatchNorm):
                module.training, module.track_running_stats = True, False

    return step
