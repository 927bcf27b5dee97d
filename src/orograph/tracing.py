"""Watches a network run: gives the result of every operation its axes, and notes what the run reached and decided by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .axes import Axis, freeze
from .axis_rules import POINTWISE, SAME_AXES, Axes, fitting, pairwise
from .layer_axis_rules import COMPUTES, RULES

Place = tuple[str, int, int, str]  # module, number of its call, operation within the call, name of the operation
CONSTANT = "a constant of the network tells its entries apart"


@dataclass
class Level:
    """One call of a module: its name, the number of this call, and the operations that ran in its own code so far."""

    module: str
    call: int
    operations: int = 0


@dataclass
class Trace:
    """What runs of a network have shown."""

    reached: set[str] = field(default_factory=set)  # named tensors that an operation used
    called: set[str] = field(default_factory=set)  # modules that ran
    visible: dict[str, list[Axes]] = field(default_factory=dict)  # module -> axes of the tensors that its own code handled
    operations: dict[str, set[str]] = field(default_factory=dict)  # module -> names of operations in its own code
    unknown: dict[str, int] = field(default_factory=dict)  # operations without a rule -> how often they ran
    rounding: float = 0.0  # unit round-off of the narrowest numbers that were made inside


class Tracer(TorchDispatchMode):
    """Gives the result of every operation its axes. A tensor that it has not seen is a constant: an axis along which it varies is frozen.

    Several runs share the axes of the `named` tensors, so that what any run shows holds for all.
    """

    def __init__(self, named: Mapping[str, Tensor] | None = None, axes: Mapping[str, Axes] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known: Any = WeakTensorKeyDictionary()  # tensor -> axes
        self.pending: Any = WeakTensorKeyDictionary()  # stacked tensors that nothing has used yet -> what was stacked
        self.fed: Any = WeakTensorKeyDictionary()  # tensors that depend on the data
        self.names: Any = WeakTensorKeyDictionary()
        self.trace = Trace()
        self.count = 0  # of all operations
        self.collect: Callable[[Place, Tensor, Axes], None] | None = None  # what is to be done with results
        self.stack = [Level("", 0)]
        self.calls: dict[str, int] = {}
        for name, tensor in (named or {}).items():
            self.label(tensor, axes[name] if axes else [Axis(size) for size in tensor.shape])
            self.names[tensor] = name

    def label(self, tensor: Tensor, axes: Axes, *, fed: bool = False) -> None:
        """From now on the tensor has these axes."""
        self.known[tensor] = axes
        if fed:
            self.fed[tensor] = True

    def axes(self, tensor: Tensor) -> Axes:
        """Axes of a tensor. Those of a constant are new at every use: it ties nothing to anything else that uses it."""
        if (stacked := self.pending.pop(tensor, None)) is not None:
            self.known[tensor] = (RULES["stack"](self.axes, stacked, {}, [tensor]) or [])[0]
        found: Axes | None = self.known.get(tensor)
        return [_constant(tensor, dim) for dim in range(tensor.ndim)] if found is None else found

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """One run of the model, whose modules tell when they start and end."""
        self.stack, self.calls = [Level("", 0)], {}
        hooks = []
        for name, module in model.named_modules():
            hooks.append(module.register_forward_pre_hook(self._entering(name), with_kwargs=True, prepend=True))
            hooks.append(module.register_forward_hook(self._leaving(name), with_kwargs=True, always_call=True))
        try:
            with self:
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.trace.called.add(name)
            self._note(self.stack[-1].module, (args, kwargs))
            call = self.calls[name] = self.calls.get(name, -1) + 1
            self.stack.append(Level(name, call))
            self._note(name, (args, kwargs))

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            while len(self.stack) > 1 and self.stack.pop().module != name:
                pass
            self._note(self.stack[-1].module, output)

        return leave

    def _note(self, module: str, tensors: Any) -> None:
        """The module's own code has these tensors at hand."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor in self.pending:
                self._note(module, self.pending[tensor][0])
            elif isinstance(tensor, Tensor) and tensor in self.fed:
                self.trace.visible.setdefault(module, []).append(self.axes(tensor))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        result = func(*args, **kwargs)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.trace.reached |= {self.names[t] for t in given if t in self.names}
        if not made or not any(t in self.known or t in self.pending for t in given):
            return result  # nothing but constants
        name = func._overloadpacket.__name__
        if name == "stack":  # the last states of all layers of a recurrent network: they are tied only where they are used
            self.pending[made[0]] = (args[0], args[1] if len(args) > 1 else kwargs.get("dim", 0))
            self.fed[made[0]] = True
            return result
        try:
            found = self._found(name, func, args, kwargs, given, made)
        except (ValueError, IndexError, TypeError, ZeroDivisionError):  # a form of the operation that its rule does not fit
            found = None
        if found is None:
            found = self._without_rule(name, given, made)
        for tensor, axes in zip(made, found, strict=True):
            if func._schema.is_mutable and tensor not in self.known and not _is_whole(tensor):
                for axis in axes:
                    freeze(axis, "they are written into a part of another tensor")
        self._record(name, given, made, found)
        return result

    def _record(self, name: str, given: list[Tensor], made: list[Tensor], found: list[Axes]) -> None:
        """Label the results of an operation and note where they were made."""
        level = self.stack[-1]
        level.operations += 1
        fed = any(t in self.fed for t in given)
        if fed:
            self.trace.operations.setdefault(level.module, set()).add(name)
        for number, (tensor, axes) in enumerate(zip(made, found, strict=True)):
            self.label(tensor, axes, fed=fed)
            if tensor.is_floating_point():
                self.trace.rounding = max(self.trace.rounding, torch.finfo(tensor.dtype).eps)
            if fed:
                self.trace.visible.setdefault(level.module, []).append(axes)
            if fed and number == 0 and self.collect is not None and worth_comparing(name, tensor):
                self.collect((level.module, level.call, level.operations, name), tensor, axes)

    def _without_rule(self, name: str, given: list[Tensor], made: list[Tensor]) -> list[Axes]:
        """What no rule is known for keeps everything where it is."""
        self.trace.unknown[name] = self.trace.unknown.get(name, 0) + 1
        reason = f"the operation {name} has no rule for these axes"
        for tensor in given:
            for axis in self.axes(tensor):
                freeze(axis, reason)
        return [[Axis(size, frozen=True, reason=reason) for size in tensor.shape] for tensor in made]

    def _found(self, name: str, func: Any, args: Any, kwargs: Any, given: list[Tensor], made: list[Tensor]) -> list[Axes] | None:
        if name in RULES:
            return RULES[name](self.axes, args, kwargs, made)
        if name in SAME_AXES:
            return [fitting(self.axes(given[0]), tensor) for tensor in made]
        if torch.Tag.pointwise in func.tags or name in POINTWISE:
            return [pairwise(self.axes, given, tensor) for tensor in made]
        return None


def worth_comparing(name: str, tensor: Tensor) -> bool:
    """Whether an operation makes new numbers, which tell units apart, and does not only move them."""
    return tensor.is_floating_point() and tensor.ndim > 1 and (name not in RULES or name in COMPUTES)


def _is_whole(tensor: Tensor) -> bool:
    """Whether a tensor has all the memory that it is in, and is not a view of a part."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _constant(tensor: Tensor, dim: int) -> Axis:
    """An axis of a constant: free where all slices are alike."""
    size = tensor.shape[dim]
    alike = size <= 1 or tensor.numel() == 0 or bool((tensor == tensor.select(dim, 0).unsqueeze(dim)).all())
    return Axis(size) if alike else Axis(size, frozen=True, reason=CONSTANT)
