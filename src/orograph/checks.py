"""What a caller passes is checked once, where it enters the package; everything inside trusts it.

`@checked` reads the annotations of a public function and refuses an argument that does not fit, in one sentence: what was passed, what is expected, what to do.
A wrong type is a TypeError, a wrong value a ValueError. Ranges are part of the annotation (`AtLeastOne`, `Seed`, `Positive`, ...). What follows from several
arguments together (k <= op.size) is checked by the function itself.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from .arguments import shown
from .expected import Expected, expectation
from .restoring import restoring
from .surroundings import is_ordinary, ordinary

Function = TypeVar("Function", bound=Callable[..., Any])


def checked(thing: Function) -> Function:
    """Check the arguments of every call against the annotations; of a class, those of its constructor and its public methods.

    A dataclass holds what was measured: numbers that its constructor takes may be NaN or infinite.
    """
    if not isinstance(thing, type):
        return cast(Function, _wrapped(thing, thing.__qualname__))
    for key, member in list(vars(thing).items()):
        if key.startswith("_") and key not in ("__init__", "__call__"):
            continue
        name = thing.__name__ if key.startswith("_") else f"{thing.__name__}.{key}"
        measured = key == "__init__" and is_dataclass(thing)
        if isinstance(member, types.FunctionType):
            setattr(thing, key, _wrapped(member, name, thing.__module__, measured=measured))
        elif isinstance(member, classmethod):
            setattr(thing, key, classmethod(_wrapped(member.__func__, name)))
    return thing


def check_settings(
    function: Callable[..., Any], name: str, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings as `function` uses them, each read as its annotation says."""
    signature = inspect.signature(function)
    readers = _readers(signature, inspect.unwrap(function).__globals__, measured=False)
    return {
        key: _read(name, signature.parameters[key], readers[key], value)
        if key in readers
        else value
        for key, value in settings.items()
    }


def refusal(
    call: str, name: str, value: Any, expected: str, kind: type[Exception] = ValueError
) -> Exception:
    """The error for an argument that does not fit."""
    return kind(f"{call}({name}={shown(value)}) needs {expected}")


def _wrapped(
    function: Callable[..., Any], name: str, module: str = "", *, measured: bool = False
) -> Callable[..., Any]:
    signature = inspect.signature(function)
    if not set(signature.parameters) - {"self", "cls"}:
        return function
    scope = vars(sys.modules[module]) if module else inspect.unwrap(function).__globals__
    readers: dict[str, Expected] = {}

    @functools.wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        if not readers:  # at the first call: every name that the annotations use is defined by then
            readers.update(_readers(signature, scope, measured=measured))
        try:
            given = signature.bind(*args, **settings)
        except TypeError as error:
            names = [key for key in signature.parameters if key not in ("self", "cls")]
            raise TypeError(
                f"{name}(): {error}. It takes: {', '.join(names) or 'nothing'}."
            ) from None
        for key, value in given.arguments.items():
            if key in readers:
                given.arguments[key] = _read(name, signature.parameters[key], readers[key], value)
        _refuse_shapes(name, readers, given.arguments)
        if is_ordinary():
            return function(*given.args, **given.kwargs)
        with restoring(ordinary):
            return function(*given.args, **given.kwargs)

    return call


def _read(name: str, parameter: inspect.Parameter, expected: Expected, value: Any) -> Any:
    """One argument, or the error that says what is wrong with it."""
    try:
        return expected.read(value)
    except (TypeError, ValueError) as error:
        default = parameter.default
        says_default = isinstance(default, bool | int | float | str) and default != ""
        leave = f"Leave it out for the default, {default!r}." if says_default else ""
        sentences = [f"{expected.words}.", str(error), expected.cure or leave]
        words = " ".join(sentence for sentence in sentences if sentence)
        raise refusal(name, parameter.name, value, words, type(error)) from None


def _refuse_shapes(
    name: str, readers: Mapping[str, Expected], arguments: Mapping[str, Any]
) -> None:
    """ValueError for tensors whose axes are not those asked for, or do not fit each other."""
    sizes: dict[str, tuple[int, str]] = {}
    for key, value in arguments.items():
        shape = readers[key].shape if key in readers else None
        if shape is None or not isinstance(value, Tensor):
            continue
        if value.ndim != len(shape.axes) or (value.dtype is torch.bool) != shape.flags:
            raise refusal(name, key, value, f"{shape.words}.")
        for axis, size in zip(shape.axes, value.shape, strict=True):
            length, other = sizes.setdefault(axis, (size, key))
            if size != length:
                raise refusal(
                    name, key, value, f"{shape.words} with {axis} = {length}, as {other} has."
                )


def _readers(
    signature: inspect.Signature, scope: Mapping[str, Any], *, measured: bool
) -> dict[str, Expected]:
    """What every annotated parameter asks for; where an annotation cannot be resolved, or allows anything, nothing is asked."""
    found = {}
    for name, parameter in signature.parameters.items():
        if parameter.annotation is not parameter.empty and parameter.kind not in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        ):
            found[name] = expectation(_resolved(parameter.annotation, scope), measured)
    return found


def _resolved(annotation: Any, scope: Mapping[str, Any]) -> Any:
    """The type that an annotation means; a name that only type checkers import means anything."""
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(scope))
    except NameError:
        return Any
