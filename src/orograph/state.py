"""Put a snapshot into a user's model for as long as it is needed, and leave no trace.

The module's Parameter and buffer *objects* are replaced by the snapshot's own, for forward and backward (activation
checkpointing recomputes the forward inside the backward), then the originals go back. Nothing is ever copied into the user's
tensors: that would break, or silently falsify, every autograd graph that is still pending on them.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

Mode = Literal["eval", "batch"]
Places = dict[str, list[tuple[nn.Module, str]]]  # canonical name -> every (module, attribute) that holds the tensor


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


@contextmanager
def swapped(model: nn.Module, slots: Slots, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Replace the objects at every place by those of `tensors` (canonical names), and put the originals back at the end.

    Attributes and buffers that a forward creates or reassigns (caches, weights computed from other weights) go back too.
    """
    modules = {id(module): module for module in model.modules()}.values()
    before = [(module, dict(module.__dict__), dict(module._parameters), dict(module._buffers)) for module in modules]
    places = [(module, attribute, name) for table in (slots.parameters, slots.buffers) for name in table for module, attribute in table[name]]
    originals = [(module, attribute, getattr(module, attribute)) for module, attribute, _ in places]
    try:
        for module, attribute, name in places:
            setattr(module, attribute, tensors[name])  # setattr, not the registry: RNNs keep a second list of their weights
        yield
    finally:
        for module, attribute, original in originals:
            setattr(module, attribute, original)
        for module, attributes, parameters, buffers in before:
            _put_back(module._parameters, parameters)
            _put_back(module._buffers, buffers)
            _put_back(module.__dict__, attributes)


def _put_back(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Make `now` hold exactly the objects of `before`."""
    if len(now) != len(before) or any(now.get(key, now) is not value for key, value in before.items()):
        now.clear()
        now.update(before)


@contextmanager
def mode_set(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Every module in eval mode; with mode="batch" only BatchNorm uses the batch's own statistics and updates none."""
    flags = [(module, module.training) for module in model.modules()]
    norms = [(module, module.track_running_stats) for module in model.modules() if isinstance(module, _BatchNorm)]
    try:
        for module, _ in flags:
            module.training = False  # the attribute, not .eval(): some modules rewrite their weights there
        if mode == "batch":
            for norm, _ in norms:
                norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for module, training in flags:
            module.training = training
        for norm, tracks in norms:
            norm.track_running_stats = tracks


@contextmanager
def rng_kept() -> Iterator[None]:
    """The global random states of Python, NumPy and torch are afterwards what they were before."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's global state, to be restored
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def differentiable(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast and caches of parametrized weights off, whatever the caller's context is."""
    cached = parametrize._cache_enabled, parametrize._cache
    parametrize._cache_enabled, parametrize._cache = 0, {}  # a user's parametrize.cached() holds the weights of another point
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        parametrize._cache_enabled, parametrize._cache = cached
