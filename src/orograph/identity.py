"""What tells one objective from another: hashes of weights, data, loss and model, and of a user's own functions as far as these can be known.

A function is known by its bytecode, its constants and defaults, and by what it refers to: numbers, texts, tensors, functions and classes in its
closure and among its globals. Weights of modules that it refers to, and objects of unknown classes, are not looked at.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .durable import fingerprint
from .linalg.checkpoints import measured
from .linalg.operator import NOISE
from .objective import Objective
from .results import Point

LIBRARIES = (Path(__file__).resolve().parent, *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")))
TORCHS_OWN = {*vars(nn.Module()), "training"}  # attributes that every module has
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SMALL = 0.01  # share of the largest of several losses below which a loss is known no better: it is a difference of larger numbers
MAX_ITEMS = 10_000  # of a list or dict that are looked at
DEPTH = 6  # of references from a function to what it uses, and on


def identity_of(objective: Objective, *, ordered: bool = False) -> dict[str, Any]:
    """What L(theta) depends on, as short hashes by name. `ordered`: the order and the batches of the examples too, where they matter."""
    found: dict[str, Any] = {**objective.fingerprints(), "loss": loss_identity(objective), "model": model_identity(objective.recipe.model), "mode": objective.mode}
    found["precision"] = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in (objective.dtype, *objective.snapshot.dtypes)}))
    reading = objective.terms().batches.reading
    if not objective.divisible:
        found["batches"] = f"{reading.grouping:016x}"
    if ordered and objective.terms().batches.ordered:
        found["order"] = short_hash(reading.hashes.tobytes().hex(), list(reading.sizes))
    return found


def measured_losses(objective: Objective, losses: list[float]) -> dict[str, Any]:
    """Losses of an objective as part of a job's description: they agree up to rounding in the precision that it is evaluated in."""
    noise = max(NOISE.get(dtype, 1e-2) for dtype in (objective.dtype, *objective.snapshot.dtypes))
    largest = max((abs(loss) for loss in losses if math.isfinite(loss)), default=1.0)
    return measured(losses, [max(abs(loss), SMALL * largest) if math.isfinite(loss) else largest for loss in losses], noise)


def point_identity(point: Point) -> str:
    """A hash of everything that a network's function depends on."""
    return fingerprint([point.theta, *point.buffers.values(), *point.frozen.values()])


def loss_identity(objective: Objective) -> str:
    """A hash of how a batch becomes a loss."""
    recipe = objective.recipe
    own = _tensors(recipe.model)
    parts: list[Any] = [_described(part, own) for part in (recipe.batch_loss, recipe.forward, recipe.count)]
    if (criterion := recipe.criterion) is not None:
        if criterion.function is not None:  # one of torch's: the same by whatever name it comes
            defaults = {name: p.default for name, p in inspect.signature(criterion.function).parameters.items() if p.default is not p.empty}
            settings = {name: value for name, value in {**defaults, **criterion.settings}.items() if name not in ("size_average", "reduce")}
            parts += [criterion.function.__name__, _described(settings, own)]
        else:
            parts += [criterion.reduction, _described(criterion.call, own)]
    return short_hash(*parts)


def model_identity(model: nn.Module) -> str:
    """A hash of a network's architecture: classes and code of its modules, their settings and hooks; not of its weights."""
    own = _tensors(model)
    return short_hash(*(part for name, module in model.named_modules() for part in (name, _module(module, own))))


def metrics_identity(objective: Objective) -> str:
    """A hash of an objective's metrics, which no operator depends on."""
    return short_hash(_described(dict(objective._metrics), _tensors(objective.recipe.model)))


def function_identity(function: Any) -> str:
    """A hash of a function, and of what it uses."""
    return short_hash(_described(function, set()))


def short_hash(*parts: Any) -> str:
    """A hash of what `repr` shows."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _tensors(model: nn.Module) -> set[int]:
    """The ids of a model's tensors, which are no part of an identity: their values are those of a point."""
    return {id(tensor) for tensor in (*model.parameters(), *model.buffers())}


def _module(module: nn.Module, own: set[int], depth: int = DEPTH) -> list[Any]:
    """One module without those inside it; with the tensors that are not among `own`."""
    settings = {name: value for name, value in vars(module).items() if name not in TORCHS_OWN and _is_plain(value)}
    code = [_described(value, own, depth - 1) for name, value in sorted(vars(module).items()) if isinstance(value, FunctionType | MethodType) and name not in TORCHS_OWN]
    hooks = [_described(hook, own, depth - 1) for name in HOOKS for hook in vars(module)[name].values()]
    held = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and id(t) not in own]
    return [_class(type(module), depth - 1), _described(settings, set(), depth - 1), code, hooks, fingerprint(held)]


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float | complex | None | torch.dtype) or (isinstance(value, tuple) and all(map(_is_plain, value)))


def _described(value: Any, own: set[int], depth: int = DEPTH) -> Any:
    """What a value is, in parts that `repr` tells apart and that are the same in every process; `own`: ids of the model's tensors."""
    go = functools.partial(_described, own=own, depth=depth - 1)
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype):
        return int(value) if isinstance(value, float) and value.is_integer() else value  # 0.0 is the same setting as 0
    if isinstance(value, Tensor | np.ndarray):
        tensor = value if isinstance(value, Tensor) else torch.from_numpy(np.ascontiguousarray(value)) if value.dtype.kind in "fiubc" else None
        return type(value).__name__ if tensor is None or id(value) in own else fingerprint([tensor])
    if depth <= 0 or isinstance(value, ModuleType | torch.device):
        return type(value).__name__
    if isinstance(value, tuple | list | set | frozenset | Mapping) and len(value) > MAX_ITEMS:
        return [type(value).__name__, len(value)]
    if isinstance(value, tuple | list):
        return [go(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(go(item)) for item in value)
    if isinstance(value, Mapping):
        return sorted((repr(go(key)), repr(go(item))) for key, item in value.items())
    if isinstance(value, functools.partial):
        return ["partial", go(value.func), go(value.args), go(value.keywords)]
    if isinstance(value, MethodType):
        return [go(value.__func__), go(value.__self__)]
    if isinstance(value, FunctionType):
        return _function(value, own, depth)
    if isinstance(value, type):
        return _class(value, depth)
    if isinstance(value, nn.Module):
        return [[name, _module(module, own, depth)] for name, module in value.named_modules()]
    if isinstance(value, BuiltinFunctionType) or _is_library(_file_of(type(value))):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return [_class(type(value), depth), go(dict(getattr(value, "__dict__", {})))]


def _function(function: FunctionType, own: set[int], depth: int) -> Any:
    """A function: the user's own by its code and what that uses, one of a library by its name."""
    if _is_library(function.__code__.co_filename):
        return f"{function.__module__}.{function.__qualname__}"
    names = _names(function.__code__)
    used = {name: function.__globals__[name] for name in names if name in function.__globals__ and not isinstance(function.__globals__[name], nn.Module)}
    cells = {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True) if _is_filled(cell)}
    held = {name: value for name, value in cells.items() if value is not function and not isinstance(value, nn.Module)}
    parts = (function.__defaults__, function.__kwdefaults__, held, {name: value for name, value in used.items() if value is not function})
    return [_code(function.__code__), *(_described(part, own, depth - 1) for part in parts)]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _code(code: CodeType) -> list[Any]:
    """Bytecode with its constants; without line numbers and file names."""
    constants = [_code(item) if isinstance(item, CodeType) else _described(item, set()) for item in code.co_consts]
    return [sys.version_info[:2], code.co_code.hex(), code.co_names, code.co_varnames, constants]


def _names(code: CodeType) -> list[str]:
    """Names that a function's code refers to, those of functions inside it too."""
    inner = [name for item in code.co_consts if isinstance(item, CodeType) for name in _names(item)]
    return sorted({*code.co_names, *inner})


def _class(kind: type, depth: int) -> Any:
    """A class: the user's own with the code of its methods, one of a library by its name."""
    if depth <= 0 or _is_library(_file_of(kind)):
        return f"{kind.__module__}.{kind.__qualname__}" if _is_library(_file_of(kind)) else kind.__qualname__
    members = {name: getattr(value, "__func__", value) for name, value in sorted(vars(kind).items())}
    held = [(name, _described(value, set(), depth - 1)) for name, value in members.items() if isinstance(value, FunctionType) or (_is_plain(value) and not name.startswith("__"))]
    return [kind.__qualname__, held, [_class(base, depth - 1) for base in kind.__bases__ if base is not object]]


def _file_of(kind: type) -> str:
    """Where a class is defined; that of a built-in one counts as Python's own."""
    module = sys.modules.get(kind.__module__)
    return getattr(module, "__file__", None) or ("<frozen>" if kind.__module__ in sys.builtin_module_names else "")


@functools.cache
def _is_library(file: str) -> bool:
    """Whether code is Python's, an installed package's or Orograph's own."""
    return file.startswith("<frozen") or (bool(file) and not file.startswith("<") and any(Path(file).resolve().is_relative_to(library) for library in LIBRARIES))
