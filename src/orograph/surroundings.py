"""What a measurement needs of its thread: gradients on, no autocast, no mode or hook of the caller's that changes numbers, random states kept.

Each function here is a step of `restoring`: it notes what is, and sets what is needed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.utils import parametrize
from torch.utils import _device, _python_dispatch

from .restoring import LOCK, Step, Undo, restoring, value_set

MODE_FLAGS = [name for name in vars(_python_dispatch) if name.startswith("_is_in_")]  # torch's notes on the stack of dispatch modes
TELL_GUARDS = getattr(_python_dispatch, "set_is_in_mode_without_ignore_compile_internals", None)  # newer versions note one of them twice


def random_states_kept(undo: list[Undo]) -> None:
    """The global random states of Python, NumPy and torch are afterwards what they were before."""
    undo.append(functools.partial(random.setstate, random.getstate()))
    undo.append(functools.partial(np.random.set_state, np.random.get_state()))  # noqa: NPY002 - the user's global state, to be restored
    undo.append(functools.partial(torch.set_rng_state, torch.get_rng_state()))
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            undo.append(functools.partial(torch.cuda.set_rng_state, torch.cuda.get_rng_state(device), device))


def rng_kept() -> restoring:
    """A `with` block after which the global random states are as before."""
    return restoring(random_states_kept)


def normal_tensors(undo: list[Undo]) -> None:
    """Out of inference mode, whose tensors autograd refuses."""
    if torch.is_inference_mode_enabled():
        guard = torch._C._InferenceMode(False)
        undo.append(lambda: guard.__exit__(None, None, None))
        guard.__enter__()


def gradients(enabled: bool) -> Step:
    """Gradients on or off, outside inference mode."""

    def step(undo: list[Undo]) -> None:
        before = torch.is_grad_enabled()
        undo.append(lambda: torch._C._set_grad_enabled(before))
        normal_tensors(undo)
        torch._C._set_grad_enabled(enabled)

    return step


def full_precision(device_type: str) -> Step:
    """No autocast, on the CPU nor on the device."""

    def step(undo: list[Undo]) -> None:
        for kind in {"cpu", device_type}:
            if torch.is_autocast_enabled(kind):
                undo.append(functools.partial(torch.set_autocast_enabled, kind, True))
                torch.set_autocast_enabled(kind, False)

    return step


def mode_stacks_kept(undo: list[Undo]) -> None:
    """Modes that are entered inside, for dispatch and for torch functions, are left again."""
    dispatch, functions = torch._C._len_torch_dispatch_stack(), torch.overrides._get_current_function_mode_stack()
    flags = {name: getattr(_python_dispatch, name) for name in MODE_FLAGS}
    device = _device.CURRENT_DEVICE

    def put_back() -> None:
        left_over = torch._C._len_torch_dispatch_stack() > dispatch
        while torch._C._len_torch_dispatch_stack() > dispatch:
            torch._C._pop_torch_dispatch_stack(None)
        if left_over or LOCK._is_owned():  # type: ignore[attr-defined]  # else another thread may have been in a mode when they were read: they are the process's
            for name, value in flags.items():
                setattr(_python_dispatch, name, value)
            if TELL_GUARDS is not None:
                TELL_GUARDS(flags["_is_in_any_mode_without_ignore_compile_internals"])
        if torch.overrides._get_current_function_mode_stack() != functions:
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()
            for mode in functions:
                torch._C._push_on_torch_function_stack(mode)
        _device.CURRENT_DEVICE = device

    undo.append(put_back)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def saved_tensors_unchanged(undo: list[Undo]) -> None:
    """A caller's hooks on tensors that autograd saves (to move or round them) are not for the measurement."""
    top: Callable[[bool], Any] = torch._C._autograd._top_saved_tensors_default_hooks
    hooks = top(True)
    if hooks is None or hooks[0] is _as_it_is:
        return

    def put_back() -> None:
        while (now := top(True)) is not None and now[0] is _as_it_is:
            torch._C._autograd._pop_saved_tensors_default_hooks()

    undo.append(put_back)
    torch._C._autograd._push_saved_tensors_default_hooks(_as_it_is, _as_it_is)


def no_cached_parametrizations(undo: list[Undo]) -> None:
    """A user's `parametrize.cached()` holds the weights of another point."""
    enabled, cache = parametrize._cache_enabled, parametrize._cache

    def put_back() -> None:
        parametrize._cache_enabled, parametrize._cache = enabled, cache

    undo.append(put_back)
    parametrize._cache_enabled, parametrize._cache = 0, {}


def defaults_set(dtype: torch.dtype, device: torch.device) -> Step:
    """The default precision and device of new tensors, as they were when the objective was made. After `mode_stacks_kept`, which takes the device back."""

    def step(undo: list[Undo]) -> None:
        value_set(torch.get_default_dtype, torch.set_default_dtype, dtype)(undo)
        if torch.get_default_device() != device:
            _device.DeviceContext(device).__enter__()

    return step


class _OwnDevice(_device.DeviceContext):
    """New tensors of the package are on the CPU unless they say otherwise; `callers` is where those of the caller are."""

    def __init__(self, callers: torch.device) -> None:
        super().__init__("cpu")
        self.callers = callers


def callers_defaults() -> tuple[torch.dtype, torch.device]:
    """Precision and device of new tensors in the code of whoever calls the package."""
    own = [mode for mode in torch.overrides._get_current_function_mode_stack() if isinstance(mode, _OwnDevice)]
    return torch.get_default_dtype(), own[0].callers if own else torch.get_default_device()


def is_ordinary() -> bool:
    """Whether new tensors are plain ones on the CPU."""
    return not torch.is_inference_mode_enabled() and torch.get_default_device().type == "cpu"


def ordinary(undo: list[Undo]) -> None:
    """New tensors are plain ones on the CPU unless they say otherwise, whatever the caller's inference mode and default device are."""
    mode_stacks_kept(undo)
    device = torch.get_default_device()
    if device.type != "cpu":
        _OwnDevice(device).__enter__()  # type: ignore[no-untyped-call]
    undo.append(functools.partial(torch._C._set_grad_enabled, torch.is_grad_enabled()))
    normal_tensors(undo)


def no_anomaly_mode(undo: list[Undo]) -> None:
    """Points where gradients are not finite are results, not errors."""
    if torch.is_anomaly_enabled():
        undo.append(functools.partial(torch.set_anomaly_enabled, True, torch.is_anomaly_check_nan_enabled()))
        torch.set_anomaly_enabled(False)
