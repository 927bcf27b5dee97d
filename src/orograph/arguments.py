"""The kinds of arguments that annotations name, and how a message shows a value."""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

MOST_TEXT = 80  # characters of a value that a message shows


@dataclass(frozen=True)
class Range:
    """Which numbers an annotation allows. NaN is never one; infinity only with `finite=False`."""

    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    finite: bool = True

    def __contains__(self, value: float) -> bool:
        inside = (
            self.at_least <= value <= self.at_most
            and (value > self.above or self.above == -math.inf)
            and (value < self.below or self.below == math.inf)
        )
        return inside and (abs(value) <= sys.float_info.max or not self.finite)

    @property
    def words(self) -> str:
        """The limits that there are."""
        if math.isfinite(self.at_least) and math.isfinite(self.at_most):
            return f"from {number_text(self.at_least)} to {number_text(self.at_most)}"
        if math.isfinite(self.above) and math.isfinite(self.below):
            return f"between {number_text(self.above)} and {number_text(self.below)}"
        limits = [
            ("of at least", self.at_least),
            ("above", self.above),
            ("of at most", self.at_most),
            ("below", self.below),
        ]
        return " and ".join(
            f"{word} {number_text(limit)}" for word, limit in limits if math.isfinite(limit)
        )


@dataclass(frozen=True, init=False)
class Shape:
    """The axes of a tensor, by name; axes of one name have one length over all arguments of a call. `flags`: of booleans."""

    axes: tuple[str, ...]
    flags: bool

    def __init__(self, *axes: str, flags: bool = False) -> None:
        object.__setattr__(self, "axes", axes)
        object.__setattr__(self, "flags", flags)

    @property
    def words(self) -> str:
        """Kind and axes, such as "a tensor of numbers of shape (m,)"."""
        axes = f"({', '.join(self.axes)}{',' if len(self.axes) == 1 else ''})"
        return f"a tensor of {'booleans' if self.flags else 'numbers'} of shape {axes}"


class NotADirectory:
    """In an annotation: a path to a file, which may not be there yet, in a folder that can be made."""


class NotAFile:
    """In an annotation: a path to a folder, which may not be there yet."""


MOST_WHOLE = 2**63 - 1  # what tensors, files and random generators hold
AtLeastOne = Annotated[int, Range(at_least=1)]
AtLeastTwo = Annotated[int, Range(at_least=2)]
Grid = Annotated[int, Range(at_least=3, at_most=10_000)]  # points a side
Whole = Annotated[int, Range(at_least=0)]
AtLeastThree = Annotated[int, Range(at_least=3)]
Seed = Annotated[int, Range(at_least=0, at_most=MOST_WHOLE)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(at_least=0)]
Share = Annotated[float, Range(above=0, below=1)]
ShareOrZero = Annotated[float, Range(at_least=0, below=1)]
AnyNumber = Annotated[float, Range(finite=False)]
Folder = Annotated[str | os.PathLike[str], NotAFile]
File = Annotated[str | Path, NotADirectory]
Vector = Annotated[Tensor, Shape("m")]


def number_text(number: float) -> str:
    return "2**63 - 1" if number == MOST_WHOLE else f"{number:g}"


def shown(value: Any) -> str:
    """A value as a message shows it: short, and a tensor by its shape."""
    if isinstance(value, Tensor):
        return f"<tensor of shape {tuple(value.shape)}, {value.dtype} on {value.device}>"
    if isinstance(value, np.ndarray):
        return f"<array of shape {value.shape}, {value.dtype}>"
    if value is None or isinstance(
        value,
        bool | int | float | complex | str | bytes | Path | torch.dtype | torch.device | np.generic,
    ):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        return text if len(text) <= MOST_TEXT else f"{text[:MOST_TEXT]}..."
    if isinstance(value, list | tuple) and len(value) <= 4:
        text = ", ".join(map(shown, value))
        return (
            f"[{text}]"
            if isinstance(value, list)
            else f"({text},)"
            if len(value) == 1
            else f"({text})"
        )
    if isinstance(value, type):
        return f"<class {value.__name__}>"
    return f"<{type(value).__name__}{f' of {len(value)}' if isinstance(value, list | tuple | dict | set) else ''}>"


def read_device(value: Any) -> Any:
    """A device that this machine has."""
    if not isinstance(value, torch.device | str):
        raise TypeError
    try:
        place = torch.empty(0, device=value)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"{str(error).splitlines()[0].split('. ')[0]}.") from None
    if place.is_meta:
        raise ValueError("Tensors on the meta device have no values.")
    return value


def read_path(value: Any) -> Any:
    """A path, which may name anything."""
    if not isinstance(value, str | os.PathLike):
        raise TypeError
    text = os.fspath(value)
    if not text or "\0" in str(text):
        raise ValueError("It names no file.")
    return value


def read_file(value: Any) -> Any:
    """A path to a file, or to one that can be written."""
    path = Path(read_path(value)).absolute()
    if path.is_dir():
        raise ValueError("It is a folder.")
    if not (there := next(parent for parent in path.parents if parent.exists())).is_dir():
        raise ValueError(f"{str(there)!r} is no folder.")
    return value


def read_folder(value: Any) -> Any:
    """A path to a folder, or to one that can be made."""
    path = Path(read_path(value)).absolute()
    if not (there := next(p for p in (path, *path.parents) if p.exists())).is_dir():
        raise ValueError(f"{str(there)!r} is no folder.")
    return value
