"""`copy.deepcopy` for models and losses that hold things which it refuses."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .state import FOREIGN

MOST_SHARED = 200  # objects that cannot be copied
T = TypeVar("T")


class CannotCopy(Exception):
    """Why there is no copy."""


def spare(key: str, value: Any, memo: dict[int, Any], stale: dict[str, Tensor]) -> None:
    """What deepcopy refuses or had better not copy: results of autograd, generators, and things that are no part of a model."""
    if isinstance(value, Tensor) and value.grad_fn is not None:
        memo[id(value)] = stale[key] = value.detach().clone()
    elif isinstance(value, torch.Generator):
        memo[id(value)] = torch.Generator(value.device).set_state(value.get_state())
    elif isinstance(value, FOREIGN):
        memo[id(value)] = value


def deep_copy(things: T, memo: dict[int, Any], stale: dict[str, Tensor] | None = None) -> T:
    """A deep copy, in which objects that cannot be copied (locks, files, connections) are shared.

    `memo`: id of an object -> what stands for it · `stale`: takes the copies of tensors that autograd had computed, whose graph a copy lacks.
    """
    stale = {} if stale is None else stale
    for _ in range(MOST_SHARED):
        try:
            return copy.deepcopy(things, dict(memo))
        except Exception as error:
            culprit = _refused(error)
            if culprit is None or isinstance(culprit, nn.Module) or id(culprit) in memo:
                raise CannotCopy(f"it cannot be copied ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})") from error
            if not isinstance(culprit, Tensor):
                memo[id(culprit)] = culprit
            spare("a tensor", culprit, memo, stale)
    raise CannotCopy("it holds too many objects that cannot be copied")


def _refused(error: BaseException) -> Any:
    """The object that `copy.deepcopy` was copying when it raised."""
    culprit, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is copy.deepcopy.__code__:
            culprit = trace.tb_frame.f_locals.get("x")
        trace = trace.tb_next
    return culprit
