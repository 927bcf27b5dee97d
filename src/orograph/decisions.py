"""Where a network's code decides by a number that the data make, and what it does when the decision is turned over.

`if score > 0.5:` reads a tensor into Python. Only one of the two ways is run for an example. `Decisions` notes every such place with
the answers given there, and can turn one of them over, so that the way that no example takes is run as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .tracing import Tracer

Site = tuple[str, int]  # file and line of the code that decides
TORCH = str(Path(torch.__file__).parent)
ANSWERS = {"__bool__", "is_nonzero", "equal", "allclose"}
NUMBERS = {"__float__", "tolist"}


class Decisions(TorchFunctionMode):
    """Notes the decisions of one run.

    tracer: knows which tensors depend on the data, and whose code is running.
    turned: places whose first answer is turned over.
    """

    def __init__(self, tracer: Tracer, turned: Sequence[Site] = ()) -> None:
        super().__init__()
        self.tracer, self.turned = tracer, list(turned)
        self.answers: dict[Site, set[bool]] = {}
        self.modules: dict[Site, str] = {}  # whose code decides there
        self.read: set[str] = set()  # modules whose code reads numbers and may do anything with them
        self.turned_at: int | None = None  # number of operations before the last of them

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in ANSWERS and name not in NUMBERS and name != "item":
            return result
        if not any(isinstance(t, Tensor) and t in self.tracer.fed for t in tree_leaves((args, kwargs))):
            return result
        if isinstance(result, bool):
            return self.decide(result)
        if name == "item" and isinstance(result, float):
            return ReadNumber(result, self)
        if any(isinstance(number, float) for number in tree_leaves(result)):
            self.note_reading()
        return result

    def decide(self, answer: bool) -> bool:
        """Note the answer; the other one where it is to be turned over."""
        site = _site()
        self.modules[site] = self.tracer.stack[-1].module
        if site in self.turned:
            self.turned.remove(site)
            self.turned_at = self.tracer.count
            return not answer
        self.answers.setdefault(site, set()).add(answer)
        return answer

    def note_reading(self) -> None:
        """The code that runs has a number of the data at hand, and what it does with it cannot be followed."""
        self.read.add(self.tracer.stack[-1].module)


class ReadNumber(float):
    """A number read from a tensor: comparing it is a decision, computing with it cannot be followed further."""

    decisions: Decisions

    def __new__(cls, value: float, decisions: Decisions) -> ReadNumber:
        """The same number, with the run's decisions at hand."""
        number = float.__new__(cls, value)
        number.decisions = decisions
        return number

    __hash__ = float.__hash__


def _comparing(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def compare(self: ReadNumber, *other: Any) -> Any:
        answer = plain(self, *other)
        return answer if answer is NotImplemented else self.decisions.decide(answer)

    return compare


def _computing(name: str) -> Callable[..., Any]:
    plain = getattr(float, name)

    def compute(self: ReadNumber, *other: Any) -> Any:
        value = plain(self, *other)
        if value is not NotImplemented:  # a tensor takes over: it has a rule of its own
            self.decisions.note_reading()
        return value

    return compute


for _name in ("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__"):
    setattr(ReadNumber, _name, _comparing(_name))
for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "divmod"):
    setattr(ReadNumber, f"__{_name}__", _computing(f"__{_name}__"))
    setattr(ReadNumber, f"__r{_name}__", _computing(f"__r{_name}__"))
for _name in ("neg", "abs", "int", "float", "round", "floor", "ceil", "trunc"):
    setattr(ReadNumber, f"__{_name}__", _computing(f"__{_name}__"))


def _site() -> Site:
    """The line of code outside of PyTorch and of this file that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None and (frame.f_code.co_filename == __file__ or frame.f_code.co_filename.startswith(TORCH)):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
