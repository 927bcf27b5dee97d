"""Stand-ins for operations that autograd cannot differentiate twice, or only at a high price; the functions stay the same.

They are in force while a snapshot is in the model, for forwards and for the backwards in which checkpointing runs forwards again, and
the user's settings are afterwards as they were.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d


@contextmanager
def plain_kernels(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Attention by plain operations, compiled modules run eagerly, checkpoints that differentiate, BatchNorm as what it is in eval mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    reentrant = torch.utils.checkpoint.CheckpointFunction
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))  # fused attention has no second derivative
        if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        if device.type == "cuda":
            stack.enter_context(_full_precision())
        stack.enter_context(_forwards_replaced(model, device))
        torch.backends.mha.set_fastpath_enabled(False)  # the encoder's fast path pads with zeros: another function
        torch.utils.checkpoint.CheckpointFunction = _NoCheckpoint  # type: ignore[assignment,misc]
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            torch.utils.checkpoint.CheckpointFunction = reentrant  # type: ignore[misc]


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, out of DistributedDataParallel, DataParallel and torch.compile: their own backward is for training alone."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif "torch._dynamo" in sys.modules and isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        else:
            return model


class _NoCheckpoint:
    """In the place of reentrant checkpointing, which cannot be differentiated by torch.autograd.grad: the function, run once."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


@contextmanager
def _full_precision() -> Iterator[None]:
    """No TF32, which cuDNN's convolutions use by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def _forwards_replaced(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Single modules get a forward that is cheaper or possible to differentiate twice."""
    replaced = []
    for module in model.modules():
        forward: Callable[..., Any] | None = None
        if "forward" in module.__dict__:  # someone else's
            continue
        if type(module) in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
            forward = functools.partial(_batch_norm, module, module.forward)
        elif isinstance(module, nn.RNNBase) and device.type == "cuda":
            forward = functools.partial(_without_cudnn, module.forward)
        if forward is not None:
            module.__dict__["forward"] = forward
            replaced.append(module)
    try:
        yield
    finally:
        for module in replaced:
            module.__dict__.pop("forward", None)


def _batch_norm(module: Any, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """BatchNorm with running statistics is one multiplication and one addition; torch's kernel needs a dozen passes for its second derivative."""
    plain = x.dtype in (torch.float32, torch.float64) and not module.training and module.running_mean is not None and x.ndim > 1
    if not plain or any(tensor is not None and tensor.dtype != x.dtype for tensor in (module.running_mean, module.running_var, module.weight, module.bias)):
        return original(x)  # in half precision, or with statistics in another one, torch's kernel rounds once, at its end
    shape = (1, -1) + (1,) * (x.ndim - 2)
    scale = (module.running_var + module.eps).rsqrt()
    scale = scale if module.weight is None else scale * module.weight
    shift = -module.running_mean * scale
    shift = shift if module.bias is None else shift + module.bias
    normed: Tensor = x * scale.view(shape) + shift.view(shape)
    return normed


def _without_cudnn(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """CuDNN's recurrent kernels have no second derivative."""
    with torch.backends.cudnn.flags(enabled=False):
        return original(*args, **kwargs)
