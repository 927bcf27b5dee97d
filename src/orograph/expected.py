"""What the annotation of a parameter asks for, in words and as a function that reads a value.

NumPy's numbers count as Python's. Bools, texts and tensors are no numbers, and 2.0 is no whole one.
"""

from __future__ import annotations

import difflib
import functools
import math
import numbers
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from .arguments import (
    MOST_WHOLE,
    NotADirectory,
    NotAFile,
    Range,
    Shape,
    read_device,
    read_file,
    read_folder,
    read_path,
    shown,
)

Read = Callable[
    [Any], Any
]  # the value as it is used; raises TypeError or ValueError: what is wrong
CURES = {  # what to do, by the class that is asked for
    "LinearOperator": "hessian(objective) and LinearOperator.from_dense(A) make one.",
    "Objective": "Make one: Objective(model, criterion, data).",
    "Optimizer": "Pass the torch optimiser that trains the model.",
    "Point": "objective.point(source) makes a Point.",
    "Plane": "Make one: Plane(origin, u, v).",
    "Record": "measure(objective, name) makes a Record, load_records(folder) reads them.",
    "Surface": "Pass record['surface'].",
    "Table": "Pass record['points'].",
}


@dataclass(frozen=True)
class Expected:
    """What an annotation asks for, in words, and how a value is read."""

    words: str
    read: Read
    cure: str = ""
    shape: Shape | None = None  # of a tensor


def expectation(hint: Any, measured: bool) -> Expected:
    """What a type asks for. `measured`: floats may be NaN or infinite, and sequences empty."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _noted(arguments[0], arguments[1], measured)
    if hint in (int, float):
        return _numeric(hint, Range(finite=not measured), nan=measured)
    if origin is Literal:
        return Expected(
            _joined(
                [f'"{choice}"' if isinstance(choice, str) else repr(choice) for choice in arguments]
            ),
            functools.partial(_choice, arguments),
        )
    if origin in (Union, types.UnionType):
        return _union(arguments, measured)
    if origin is Callable or hint is Callable:
        return Expected("a function", _callable)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(arguments, measured)
    if origin is not None and issubclass(origin, tuple) and ... not in arguments:
        return _fixed(arguments, measured)
    if origin is not None and issubclass(origin, Iterable):
        return _sequence(origin, arguments, measured)
    return _instance(hint)


def _noted(hint: Any, note: Any, measured: bool) -> Expected:
    """What a type asks for with what its note adds."""
    if note is NotADirectory:
        return Expected("a path of a file", read_file)
    if note is NotAFile:
        return Expected("a path of a folder", read_folder)
    if isinstance(note, Shape):
        return Expected(note.words, _tensor, shape=note)
    if isinstance(note, Range):
        return _numeric(hint, replace(note, finite=note.finite and not measured), nan=measured)
    return expectation(hint, measured)


def _numeric(kind: type, limits: Range, *, nan: bool = False) -> Expected:
    """A whole or a real number within limits."""
    most = MOST_WHOLE if kind is int else sys.float_info.max

    def read(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(
            value, numbers.Integral if kind is int else numbers.Real
        ):
            raise TypeError
        number: float = int(value) if isinstance(value, numbers.Integral) else float(value)
        if abs(number) > most and abs(number) != math.inf:
            raise ValueError("It is too large.")
        if number not in limits and not (nan and number != number):
            raise ValueError
        return number

    word = (
        "a whole number"
        if kind is int
        else "a number"
        if nan or not limits.finite
        else "a finite number"
    )
    return Expected(f"{word} {limits.words}".rstrip(), read)


def _choice(choices: Sequence[Any], value: Any) -> Any:
    if not isinstance(value, tuple({type(choice) for choice in choices})):
        raise TypeError
    if value not in choices:
        near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], 1)
        raise ValueError(f"Did you mean {near[0]!r}?" if near else "")
    return value


def _union(hints: Sequence[Any], measured: bool) -> Expected:
    """Any of several; the first that takes the value reads it."""
    if any(hint in (Path, os.PathLike) or get_origin(hint) is os.PathLike for hint in hints):
        paths = [
            hint
            for hint in hints
            if hint is str or hint is Path or hint is os.PathLike or get_origin(hint) is os.PathLike
        ]
        options = [
            Expected("a path", read_path),
            *(expectation(hint, measured) for hint in hints if hint not in paths),
        ]
    elif torch.device in hints:
        options = [
            Expected("a device that this machine has", read_device),
            *(expectation(hint, measured) for hint in hints if hint not in (torch.device, str)),
        ]
    else:
        options = [expectation(hint, measured) for hint in hints]

    def read(value: Any) -> Any:
        wrong: list[ValueError] = []
        for option in options:
            try:
                return option.read(value)
            except ValueError as error:
                wrong.append(error)
            except TypeError:
                continue
        raise max(wrong, key=lambda error: len(str(error))) if wrong else TypeError

    return Expected(
        _joined([option.words for option in options]),
        read,
        next((option.cure for option in options if option.cure), ""),
        next((option.shape for option in options if option.shape), None),
    )


def _mapping(arguments: Sequence[Any], measured: bool) -> Expected:
    keys, values = (expectation(hint, measured) for hint in arguments)

    def read(value: Any) -> Any:
        if not isinstance(value, Mapping):
            raise TypeError
        read_items = {
            _item(keys, key, "The name"): _item(values, item, f"The value of {shown(key)}")
            for key, item in value.items()
        }
        return value if all(read_items[key] is value[key] for key in value) else read_items

    return Expected(f"a mapping of {keys.words} to {values.words}", read)


def _fixed(arguments: Sequence[Any], measured: bool) -> Expected:
    """A tuple of a fixed length; a list of that length, as JSON has it, is one."""
    options = [expectation(hint, measured) for hint in arguments]

    def read(value: Any) -> Any:
        if not isinstance(value, tuple | list):
            raise TypeError
        if len(value) != len(options):
            raise ValueError(f"It has {len(value)} entries.")
        return tuple(
            _item(option, item, f"Entry {index}")
            for index, (option, item) in enumerate(zip(options, value, strict=True))
        )

    return Expected(f"({', '.join(option.words for option in options)})", read)


def _sequence(origin: type, arguments: Sequence[Any], measured: bool) -> Expected:
    """A list, a tuple, or whatever can be iterated; what can be read only once is not read here."""
    one = expectation(arguments[0], measured)
    wanted = Sequence if issubclass(origin, Sequence) else origin

    def read(value: Any) -> Any:
        if isinstance(value, str | bytes | Mapping | Tensor | np.ndarray) or not isinstance(
            value, wanted
        ):
            raise TypeError
        if not isinstance(value, Sequence):
            return value
        if not value and not measured and wanted is Sequence:
            raise ValueError("It is empty.")
        items = [_item(one, item, f"Entry {index}") for index, item in enumerate(value)]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items

    return Expected(
        f"a sequence, each entry {one.words}" if arguments[0] is not Any else "a sequence", read
    )


def _item(expected: Expected, value: Any, where: str) -> Any:
    """An entry of a container."""
    try:
        return expected.read(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where} is {shown(value)}.") from None


def _instance(hint: Any) -> Expected:
    """An object of a class; None for `None`; anything for what is no class."""
    if hint is None or hint is type(None):
        return Expected("None", functools.partial(_of_class, type(None)))
    if hint is Any or not isinstance(hint, type):
        return Expected("something that has values", _anything)
    words = {
        bool: "True or False",
        str: "a text",
        nn.Module: "an nn.Module",
        Tensor: "a tensor",
    }
    read = {bool: _flag, Tensor: _tensor}.get(hint, functools.partial(_of_class, hint))
    return Expected(
        words.get(
            hint,
            f"{'an' if hint.__name__[0] in 'AEIO' else 'a'} {hint.__name__}",
        ),
        read,
        CURES.get(hint.__name__, ""),
    )


def _anything(value: Any) -> Any:
    """Whatever it is, but no tensor without values."""
    return _tensor(value) if isinstance(value, Tensor) and value.is_meta else value


def _of_class(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _callable(value: Any) -> Any:
    if not callable(value):
        raise TypeError
    return value


def _tensor(value: Any) -> Any:
    if not isinstance(value, Tensor):
        raise TypeError
    if value.is_meta:
        raise ValueError("It is on the meta device, where tensors have no values.")
    if value.layout != torch.strided or value.is_complex() or value.is_quantized:
        raise ValueError("It is sparse, complex or quantised: pass a dense one of real numbers.")
    return value


def _joined(words: Sequence[str]) -> str:
    """a, b or c."""
    words = list(dict.fromkeys(words))
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
