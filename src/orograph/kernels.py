"""Stand-ins for operations that autograd cannot differentiate twice, or only at a high price; the functions stay the same.

They are in force while a snapshot is in the model, for forwards and for the backwards in which checkpointing runs forwards again, and
the user's settings are afterwards as they were.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn.modules.batchnorm import BatchNorm1d, BatchNorm2d, BatchNorm3d

from .restoring import Step, Undo, attribute_set, forward_set, value_set


def plain_kernels(device: torch.device) -> Step:
    """Attention by plain operations, compiled modules run eagerly, checkpoints that differentiate, no TF32."""
    return lambda undo: _set_plain_kernels(device, undo)


def _set_plain_kernels(device: torch.device, undo: list[Undo]) -> None:
    for name in ("flash", "mem_efficient", "cudnn", "math"):  # fused attention has no second derivative
        if hasattr(cuda, f"{name}_sdp_enabled"):
            value_set(getattr(cuda, f"{name}_sdp_enabled"), getattr(cuda, f"enable_{name}_sdp"), name == "math")(undo)
    if "torch._dynamo" in sys.modules:  # else nothing can have been compiled
        compiler = torch._dynamo.eval_frame
        undo.append(functools.partial(compiler._set_stance, compiler._stance))
        compiler._set_stance(compiler.DynamoStance("force_eager"))
    if device.type == "cuda":
        attribute_set(torch.backends.cudnn, "allow_tf32", False)(undo)
        attribute_set(cuda.matmul, "allow_tf32", False)(undo)
    mha = torch.backends.mha  # the encoder's fast path pads with zeros: another function
    value_set(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False)(undo)
    attribute_set(torch.utils.checkpoint, "CheckpointFunction", _NoCheckpoint)(undo)


def plain_forwards(model: nn.Module, device: torch.device) -> Step:
    """BatchNorm as what it is in eval mode, and no cuDNN recurrences: forwards that are cheaper, or possible, to differentiate twice."""

    def step(undo: list[Undo]) -> None:
        for module in model.modules():
            if "forward" in module.__dict__:  # someone else's
                continue
            if type(module) in (BatchNorm1d, BatchNorm2d, BatchNorm3d):
                forward_set(module, functools.partial(_batch_norm, module, module.forward), undo)
            elif isinstance(module, nn.RNNBase) and device.type == "cuda":
                forward_set(module, functools.partial(_without_cudnn, module.forward), undo)

    return step


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
