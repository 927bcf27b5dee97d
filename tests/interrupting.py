"""KeyboardInterrupt at a chosen moment, and all of a process's state that a measurement must leave alone."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo  # else a first use would import it, and give it a stance, in the middle
import torch.utils.checkpoint
from torch.nn.utils import parametrize
from torch.utils import _device, _python_dispatch

import orograph
from orograph import restoring

from .test_snapshot import state_of

PACKAGE = Path(orograph.__file__).parent
RESTORING = tuple(str(PACKAGE / f"{name}.py") for name in ("restoring", "surroundings", "state", "kernels", "snapshots", "copies", "deep_copies"))
Moment = tuple[str, int, str]  # file, line, event


class Interrupter:
    """Counts the moments (calls, lines and returns) of some files that a function passes, and interrupts it at one of them.

    `at`: number of the moment, or a moment and how often it has to come
    `forks`: numbers of moments at which a forked child is interrupted and this process goes on, so that one run serves many moments
    """

    def __init__(self, files: tuple[str, ...], at: int | tuple[Moment, int] | None = None, forks: frozenset[int] = frozenset()) -> None:
        self.files, self.at, self.forks, self.count, self.seen = files, at, forks, 0, dict[Moment, int]()
        self.struck: Moment | None = None
        self.is_child = False
        self.failed: list[Moment] = []

    def __call__(self, function: Callable[[], Any]) -> Any:
        before = sys.gettrace()
        sys.settrace(self._enter)
        try:
            return function()
        finally:
            sys.settrace(before)

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self.files):
            return None
        self._pass(frame, event)
        return self._inside

    def _inside(self, frame: FrameType, event: str, arg: Any) -> Any:
        self._pass(frame, event)
        return self._inside

    def _pass(self, frame: FrameType, event: str) -> None:
        if event == "exception" or self.struck is not None:
            return
        moment = frame.f_code.co_filename, frame.f_lineno, event
        self.count += 1
        self.seen[moment] = self.seen.get(moment, 0) + 1
        if self.count in self.forks:
            state = random.getstate()
            self.is_child = not (child := os.fork())
            if self.is_child:
                random.setstate(state)  # which Python seeds anew in every child
            elif os.waitpid(child, 0)[1]:
                self.failed.append(moment)
        if self.is_child or self.at in (self.count, (moment, self.seen[moment])):
            self.struck = moment
            raise KeyboardInterrupt


def moments_of(function: Callable[[], Any], files: tuple[str, ...] = RESTORING) -> list[tuple[Moment, int]]:
    """The first and the last time that `function` passes every line of some files."""
    counter = Interrupter(files)
    counter(function)
    return [(moment, time) for moment, times in counter.seen.items() for time in sorted({1, times})]


def process_state(model: torch.nn.Module) -> dict[str, Any]:
    """Everything of a model, the thread and the process that a measurement must not touch."""
    free: list[bool] = []
    other = threading.Thread(target=lambda: free.append(restoring.LOCK.acquire(blocking=False) and (restoring.LOCK.release() or True)))
    other.start()
    other.join()
    return state_of(model) | {
        "lock is free": free == [True],
        "objects": {name: {key: id(value) for key, value in module.__dict__.items() if not isinstance(value, (bool, int, float))} for name, module in model.named_modules()},
        "held": {name: {key: [id(part) for part in (value.values() if isinstance(value, dict) else value)] for key, value in module.__dict__.items() if isinstance(value, dict | list)} for name, module in model.named_modules()},
        "stacks": (torch._C._len_torch_dispatch_stack(), torch._C._len_torch_function_stack(), _python_dispatch._is_in_torch_dispatch_mode, _device.CURRENT_DEVICE),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled()),
        "hooks of autograd": torch._C._autograd._top_saved_tensors_default_hooks(True),
        "kernels": (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.cudnn_sdp_enabled(), torch.utils.checkpoint.CheckpointFunction),
        "caches": (parametrize._cache_enabled, id(parametrize._cache)),
        "signals": signal.getsignal(signal.SIGINT),
        "stance": torch._dynamo.eval_frame._stance,
    }
