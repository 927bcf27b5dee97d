"""A private copy of the user's model and loss, so that a measurement never touches theirs.

The copy is made by `copy.deepcopy`, in one go with the criterion and whatever else is called, so that references among them lead to the copy. Its
parameters and buffers are placeholders without memory: a snapshot puts its own tensors in their places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .deep_copies import CannotCopy, deep_copy, spare
from .evaluation import no_gradient
from .nesting import Batch, map_tensors
from .restoring import under
from .snapshots import Snapshot
from .state import Slots, containers, entries, find_slots, renew_keys
from .surroundings import normal_tensors
from .terms import Recipe, Term, fresh, was_written

PRIVATE = "a private copy of the model"
Metrics = Mapping[str, Callable[..., Any]]


@under(normal_tensors)
def isolated(snapshot: Snapshot, recipe: Recipe, metrics: Metrics, first: int, batch: Batch) -> tuple[Snapshot, Recipe, Metrics]:
    """The same with a private copy of the user's model, where there can be one; `batch` is run through both, and everything must agree to the last bit."""
    given = map_tensors(fresh, batch)
    before = _outcome(snapshot, recipe, given, first)
    recipe = replace(recipe, writes=was_written(given, batch))
    try:
        private, own_recipe, own_metrics, stale = _copied(snapshot, recipe, metrics)
        watch = _Watch(snapshot.slots.present() | stale)
        try:
            after = _outcome(private, own_recipe, map_tensors(fresh, batch), first, watch)
        except Exception as error:
            raise CannotCopy(f"its copy raises {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
        if watch.touched:
            raise CannotCopy(f"the model or its loss reaches {watch.touched!r} of the user's module from outside, through a closure or a global variable")
        if not _same(before, after):
            raise CannotCopy("its copy gives another loss")
    except CannotCopy as reason:
        return replace(snapshot, isolation=f"the model itself, with its own tensors put back afterwards: {reason}"), recipe, metrics
    return private, own_recipe, own_metrics


def _outcome(snapshot: Snapshot, recipe: Recipe, given: Batch, first: int, watch: TorchDispatchMode | None = None) -> list[Tensor]:
    """Output and loss of one batch."""
    term = Term(recipe, given, first)
    with snapshot.applied(scratch=True), no_gradient(recipe):
        if watch is not None:
            watch.__enter__()  # `applied` leaves it again
        output = term.output()
        kept = [tensor.detach().clone() for tensor in _tensors(output)]
        return [*kept, term.loss_of(output).detach().clone()]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _same(before: list[Tensor], after: list[Tensor]) -> bool:
    """Equal to the last bit."""
    return len(before) == len(after) and all((a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)) or bool((a.isnan() & b.isnan() | (a == b)).all()) for a, b in zip(before, after, strict=True))


class _Watch(TorchDispatchMode):
    """Names a tensor of the user's module that an operation reads or writes."""

    def __init__(self, users: Mapping[str, Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {_address(tensor): name for name, tensor in users.items() if _address(tensor)}
        self.touched: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor) and _address(tensor) in self.names:
                self.touched = self.names[_address(tensor)]
        return func(*args, **(kwargs or {}))


def _address(tensor: Tensor) -> int:
    """Where its numbers begin; 0 for what has no storage of that kind."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided and tensor.device.type != "meta" else 0


def _copied(snapshot: Snapshot, recipe: Recipe, metrics: Metrics) -> tuple[Snapshot, Recipe, Metrics, dict[str, Tensor]]:
    """Copies with placeholders for parameters and buffers; and the tensors in them that autograd had computed from others, which only a copy of the numbers stands for."""
    model, slots = snapshot.users.model, snapshot.users.slots
    present = slots.present()
    held = {name: _placeholder(tensor) for name, tensor in present.items()}
    memo: dict[int, Any] = {id(tensor): held[name] for name, tensor in present.items()}
    stale: dict[str, Tensor] = {}
    for holder in containers((*model.modules(), *recipe.calls, *metrics.values())):
        for key, value in entries(holder):
            if id(value) not in memo:
                spare(str(key), value, memo, stale)
    own_model, own_recipe, own_metrics = deep_copy((model, recipe, metrics), memo, stale)
    shared = {id(module) for module in model.modules()} & {id(module) for module in own_model.modules()}
    if shared:
        name = next(name for name, module in model.named_modules() if id(module) in shared)
        raise CannotCopy(f"its copy shares {repr(name) if name else 'all its layers'} with it, as the class's own __deepcopy__ says")
    own_slots = find_slots(own_model)
    if _shape(own_model, own_slots) != _shape(model, slots):
        raise CannotCopy("its copy has other layers or parameters")
    for table in (own_slots.parameters, own_slots.buffers):
        for name, places in table.items():
            for module, attribute in places:
                if getattr(module, attribute) is not held[name]:
                    setattr(module, attribute, held[name])
    for holder in containers((own_model, *own_recipe.calls, *own_metrics.values())):
        renew_keys(holder, {id(tensor): held[name] for name, tensor in present.items()})
    private = replace(snapshot, model=own_model, slots=own_slots, extras=(*own_recipe.calls, *own_metrics.values()), isolation=PRIVATE)
    return private, own_recipe, own_metrics, stale


def _placeholder(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta")
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _shape(model: nn.Module, slots: Slots) -> object:
    """What a copy has in common with its original."""
    layers = [(name, type(module).__name__) for name, module in model.named_modules(remove_duplicate=False)]
    tables = [{name: [attribute for _, attribute in places] for name, places in table.items()} for table in (slots.parameters, slots.buffers)]
    return layers, tables, slots.aliases
