"""Changes of a module, a thread or the process that are undone whatever happens, an interrupt at any moment included.

A step of a change first appends a function to a list, which puts the old state back, and only then changes anything. Such a function sets
absolute values, so it may run early, twice, or again after an interrupt.
"""

from __future__ import annotations

import functools
import random
import threading
import weakref
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import nn

Undo = Callable[[], object]
Step = Callable[[list[Undo]], None]
P = ParamSpec("P")
T = TypeVar("T")

LOCK = threading.RLock()  # of the process, since the flags that a measurement sets are those of the process


class _Record:
    """What is still to be undone, last change first."""

    def __init__(self) -> None:
        self.undo: list[Undo] = []
        self.watch: object = None

    def finish(self) -> None:
        """Undo everything. After an interrupt the next call goes on where this one stopped."""
        failure: Exception | None = None
        while self.undo:
            try:
                self.undo[-1]()
            except Exception as error:  # the rest is undone all the same
                failure = failure or error
            self.undo.pop()
        if failure is not None:
            raise failure

    def finish_surely(self, _: object = None) -> None:
        """Undo everything, however often it is interrupted."""
        while self.undo:
            try:
                self.finish()
            except BaseException:
                continue


class _Token:
    """Lives as long as the `with` statement that holds it."""


class _Leave:
    """The `__exit__` of `restoring`.

    Python may raise KeyboardInterrupt between the end of a block and the first line of `__exit__`. So the function that a `with` statement holds
    owns a token, no frame does, and the death of the token undoes what is left.
    """

    def __get__(self, owner: Any, kind: type) -> Callable[..., None]:
        if owner is None:  # as contextlib.ExitStack asks
            return lambda manager, *error: _leave(manager.record, *error)
        leave = functools.partial(_leave, owner.record)
        leave.token = _Token()  # type: ignore[attr-defined]
        owner.record.watch = weakref.ref(leave.token, owner.record.finish_surely)  # type: ignore[attr-defined]
        return leave


def _leave(record: _Record, *error: object) -> None:
    try:
        record.finish()
    finally:
        record.finish()  # has work only after an interrupt of the first
    record.watch = None


class restoring:
    """`with restoring(step, ...)`: the steps are made one after the other, and undone at the end. For one use."""

    __exit__ = _Leave()

    def __init__(self, *steps: Step) -> None:
        self.steps, self.record = steps, _Record()

    def __enter__(self) -> None:
        try:
            for step in self.steps:
                step(self.record.undo)
        except BaseException:
            self.record.finish_surely()
            raise


def locked(undo: list[Undo]) -> None:
    """No other thread makes a change under this lock at the same time; the thread itself may make several."""
    if not LOCK._is_owned():  # type: ignore[attr-defined]
        undo.append(_unlock)
        LOCK.acquire()


def _unlock() -> None:
    if LOCK._is_owned():  # type: ignore[attr-defined]
        LOCK.release()


def attribute_set(holder: Any, name: str, value: object) -> Step:
    """`holder.name` is `value`."""

    def step(undo: list[Undo]) -> None:
        before = getattr(holder, name)
        undo.append(lambda: setattr(holder, name, before))
        setattr(holder, name, value)

    return step


def value_set(read: Callable[[], T], write: Callable[[T], object], value: T) -> Step:
    """What `read` returns is `value`, set by `write`."""

    def step(undo: list[Undo]) -> None:
        before = read()
        if before != value:
            undo.append(functools.partial(write, before))
            write(value)

    return step


def forward_set(module: nn.Module, function: Callable[..., Any], undo: list[Undo]) -> None:
    """A module runs another function."""
    before = module.__dict__.get("forward")

    def put_back() -> None:
        if before is not None:
            module.__dict__["forward"] = before
        else:
            module.__dict__.pop("forward", None)

    undo.append(put_back)
    module.__dict__["forward"] = function


def random_state_kept(value: object) -> Undo | None:
    """Puts back the state that a random generator has now; None for anything else."""
    if isinstance(value, torch.Generator):
        return functools.partial(value.set_state, value.get_state())
    if isinstance(value, random.Random):
        return functools.partial(value.setstate, value.getstate())
    if isinstance(value, np.random.Generator):
        return functools.partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return functools.partial(value.set_state, value.get_state())
    return None


def under(*steps: Step) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator: every call of the function runs inside `restoring(*steps)`."""

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            with restoring(*steps):
                return function(*args, **kwargs)

        return call

    return decorate
