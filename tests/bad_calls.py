"""Wrong arguments for every parameter of every public callable, and how each call ends.

The callables come from `orograph.__all__` and `list_probes()`, their parameters from their signatures, the wrong values from the parameters' types. A call is *clear* where
Orograph itself refuses it in one message that names the parameter and says what is expected; *raw* where anything else is raised; *accepted* where it returns or hangs.
"""

from __future__ import annotations

import inspect
import linecache
import math
import os
import re
import signal
import traceback
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

import orograph as og
from orograph.registry import find_probe

from .good_calls import good_calls

SPECIAL = ("__call__", "__matmul__", "__getitem__")
SECONDS = 10  # after which a call counts as hanging
LONGEST = 1000  # characters of a message
PACKAGE = str(Path(og.__file__).parent)
EXPECTS = re.compile(r"\b(needs?|must|choose|pass|use|give|make|takes?|has|holds|are|is no|cannot|did you mean|ask|save|restore)\b", re.IGNORECASE)
RAW = re.compile(r"object has no attribute|not supported between|TensorBase|RuntimeError|unsupported operand|object is not|\bmust be real number|has no len|Expected all tensors|broadcast|expected m1|numpy\.ndarray")


class Hangs(BaseException):
    """A call has taken longer than SECONDS."""


@dataclass(frozen=True)
class Wrong:
    """One wrong value: a label, by which exceptions are listed, and the value."""

    label: str
    value: Any


@dataclass(frozen=True)
class Outcome:
    """How one call ended."""

    call: str
    parameter: str
    wrong: str
    kind: Literal["clear", "raw", "accepted", "fine"]
    text: str


def public_callables() -> list[str]:
    """Names of everything public that can be called with arguments: functions, constructors, public methods, and probes by their settings."""
    found = []
    for name in og.__all__:
        thing = getattr(og, name)
        if not callable(thing) or (isinstance(thing, type) and issubclass(thing, BaseException)):
            continue
        found.append(name)
        if isinstance(thing, type):
            own = [key for key, value in vars(thing).items() if isinstance(value, types.FunctionType | classmethod | staticmethod)]
            found += [f"{name}.{key}" for key in own if not key.startswith("_") or key in SPECIAL]
    return found + [f"measure {name}" for name in og.list_probes() if find_probe(name).function.__module__.startswith("orograph.")]


def parameters_of(name: str, function: Callable[..., Any]) -> dict[str, Any]:
    """The parameters with their types; of a probe its settings."""
    if name.startswith("measure "):
        function = find_probe(name.removeprefix("measure ")).function
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    chosen = {key: p for key, p in inspect.signature(function).parameters.items() if p.kind in kinds}
    if name.startswith("measure "):
        chosen = {key: p for key, p in chosen.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return {key: resolved(p.annotation, function) for key, p in chosen.items()}


def resolved(annotation: Any, function: Callable[..., Any]) -> Any:
    """The type that an annotation means, where the function was written."""
    if not isinstance(annotation, str):
        return annotation
    module = inspect.getmodule(inspect.unwrap(function))
    return eval(annotation, dict(vars(module)))


def wrong_values(hint: Any, folder: Path) -> Iterator[Wrong]:
    """Values that are wrong for a type, those of every kind that it is made of."""
    options = list(options_of(hint))
    kinds = {option for option in options if isinstance(option, type)} | {get_origin(option) for option in options}
    takes_none = type(None) in options or Any in options
    numeric = bool(kinds & {int, float})
    if not takes_none:
        yield Wrong("None", None)
    yield Wrong("an object", object())
    if Any in options:
        yield from wrong_sources(folder)
        return
    if numeric:
        yield from wrong_numbers(kinds, options)
    elif Tensor not in kinds:
        yield Wrong("a tensor", torch.ones(3))
    if bool in kinds:
        yield from (Wrong("0", 0), Wrong("1", 1), Wrong("a float", 1.5), Wrong("yes", "yes"))
    if not numeric and bool not in kinds:
        yield from (Wrong("a number", 3.5), Wrong("True", True))
    if Literal in kinds:
        choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
        yield from (Wrong("misspelt", f"{choices[0]}x"), Wrong("empty text", ""), Wrong("bytes", b"x"), Wrong("a list of a choice", [choices[0]]))
    if str in kinds and not {Path, os.PathLike} & kinds:
        yield from (Wrong("bytes", b"x"), Wrong("a list of texts of numbers", [3]))
    if {Path, os.PathLike} & kinds:
        yield from (Wrong("empty path", ""), Wrong("a path with a NUL", "a\0b"), Wrong("a folder", folder), Wrong("below a file", folder / "a_file" / "x.json"), Wrong("bytes", b"x"))
    if Tensor in kinds:
        yield from wrong_tensors()
    containers = [option for option in options if get_origin(option) is not None and isinstance(get_origin(option), type) and issubclass(get_origin(option), Iterable)]
    for option in containers:
        yield from wrong_containers(option, folder, texts=str in kinds)


def options_of(hint: Any) -> Iterator[Any]:
    """The members of a union, without notes on them."""
    if get_origin(hint) is Annotated:
        yield from options_of(get_args(hint)[0])
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from options_of(part)
    else:
        yield hint


def wrong_numbers(kinds: set[Any], options: list[Any]) -> Iterator[Wrong]:
    """Wrong for any parameter that takes a number."""
    if bool not in kinds:
        yield Wrong("True", True)
    if str not in kinds:
        yield Wrong("a text of a number", "3")
    yield from (Wrong("NaN", math.nan), Wrong("inf", math.inf), Wrong("-inf", -math.inf), Wrong("-1", -1), Wrong("a complex number", 1 + 1j), Wrong("a list of a number", [3]))
    yield from (Wrong("numpy NaN", np.float64("nan")), Wrong("beyond float", 10**400), Wrong("0", 0))
    if float not in kinds:
        yield from (Wrong("a float", 2.5), Wrong("a whole float", 2.0), Wrong("numpy float", np.float64(2)), Wrong("enormous", 10**30))
    if Tensor not in kinds:
        yield from (Wrong("a tensor", torch.tensor(3)), Wrong("an array", np.ones(3)))


def wrong_tensors() -> Iterator[Wrong]:
    """Wrong for any parameter that takes a tensor."""
    yield from (Wrong("a list", [1.0, 2.0]), Wrong("an array", np.ones(3)), Wrong("a text", "x"))
    yield from (Wrong("on meta", torch.ones(3, device="meta")), Wrong("NaN", torch.full((51,), math.nan, dtype=torch.float64)), Wrong("too short", torch.ones(7, dtype=torch.float64)))
    yield from (Wrong("four axes", torch.ones(2, 2, 2, 2, dtype=torch.float64)), Wrong("complex", torch.ones(51, dtype=torch.complex128)), Wrong("empty", torch.ones(0, dtype=torch.float64)))
    yield from (Wrong("bools", torch.ones(51, dtype=torch.bool)), Wrong("sparse", torch.eye(51, dtype=torch.float64).to_sparse()))


def wrong_containers(option: Any, folder: Path, *, texts: bool) -> Iterator[Wrong]:
    """A container of a wrong kind, empty, and with one entry of each wrong kind."""
    origin, arguments = get_origin(option), get_args(option)
    if not texts:
        yield Wrong("a text", "x")
    if issubclass(origin, Mapping):
        yield from (Wrong("a list", ["x"]), Wrong("a name that is no text", {3: 1}))
        yield from (Wrong(f"a value that is {wrong.label}", {"x": wrong.value}) for wrong in wrong_values(arguments[1], folder) if arguments[1] is not Any)
    elif issubclass(origin, tuple) and ... not in arguments:
        yield from (Wrong("too short a tuple", ()), Wrong("too long a tuple", (1,) * (len(arguments) + 1)))
    else:
        if issubclass(origin, Sequence):
            yield from (Wrong("empty", []), Wrong("a mapping", {"x": 1}))
        if arguments and arguments[0] is not Any:
            yield from (Wrong(f"an entry that is {wrong.label}", [wrong.value]) for wrong in wrong_values(arguments[0], folder))


def wrong_sources(folder: Path) -> Iterator[Wrong]:
    """Wrong for whatever a network, data or a plane is read from."""
    yield from (Wrong("a number", 3.5), Wrong("True", True), Wrong("bytes", b"x"), Wrong("empty", []), Wrong("empty mapping", {}), Wrong("a function", lambda x: x), Wrong("a class", nn.Linear))
    yield from (Wrong("a missing file", folder / "none.pt"), Wrong("a folder", folder), Wrong("a text", "x"), Wrong("on meta", torch.ones(51, device="meta")), Wrong("an array", np.ones(51)))
    yield from (Wrong("NaN", torch.full((51,), math.nan, dtype=torch.float64)), Wrong("too short", torch.ones(7, dtype=torch.float64)), Wrong("numbers", [1, 2]), Wrong("another network", nn.Linear(3, 2)))


def outcomes(name: str, folder: Path) -> Iterator[Outcome]:
    """How every wrong call of one callable ends."""
    function, good, positional = good_calls(folder)[name]
    for parameter, hint in parameters_of(name, function).items():
        for wrong in wrong_values(hint, folder):
            given, places = dict(good), positional
            given[parameter] = wrong.value
            yield judged(name, function, parameter, wrong, places, given)
    if parameters_of(name, function) and not name.endswith(("__getitem__", "__matmul__")):
        yield judged(name, function, "no_such_name", Wrong("unknown", 1), positional, {**good, "no_such_name": 1})


def judged(name: str, function: Callable[..., Any], parameter: str, wrong: Wrong, places: tuple[Any, ...], given: dict[str, Any]) -> Outcome:
    """One call, and whether it was refused in one clear message."""
    reason = next((why for (call, key, label), why in FINE.items() if re.fullmatch(call, name) and re.fullmatch(key, parameter) and re.fullmatch(label, wrong.label)), None)
    if reason is not None and reason.startswith("any"):
        return Outcome(name, parameter, wrong.label, "fine", reason)
    signal.signal(signal.SIGALRM, _hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = function(*places, **given)
    except Hangs:
        return Outcome(name, parameter, wrong.label, "fine" if reason else "accepted", reason or "hangs")
    except Exception as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        fault = unclear(error, parameter, wrong.value)
        return Outcome(name, parameter, wrong.label, "raw" if fault else "clear", f"{fault}{type(error).__name__}: {error}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return Outcome(name, parameter, wrong.label, "fine" if reason else "accepted", reason or f"returned {type(found).__name__}")


def unclear(error: Exception, parameter: str, value: Any) -> str:
    """What a message lacks, or nothing."""
    text = str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    if not isinstance(error, TypeError | ValueError | KeyError | IndexError | FileNotFoundError | og.OrographError):
        return "[of another kind] "
    if not last.filename.startswith(PACKAGE) or not line.startswith("raise"):
        return f"[raised at {Path(last.filename).name}:{last.lineno}: {line[:60]}] "
    if parameter not in text and (isinstance(value, Tensor | np.ndarray) or str(value) not in text or not str(value)) and not _names(parameter, text):
        return "[does not name the parameter] "
    if not EXPECTS.search(text):
        return "[says nothing of what is expected] "
    if found := RAW.search(text):
        return f"[raw words: {found[0]}] "
    return "[too long] " if len(text) > LONGEST else ""


def _names(parameter: str, text: str) -> bool:
    """Words by which a message may call a parameter."""
    words = SPOKEN.get(parameter, ())
    return any(word in text for word in words)


def _hang(number: int, frame: Any) -> None:
    raise Hangs


SPOKEN = {
    "a": ("network", "weights", "point", "flat tensor"), "b": ("network", "weights", "point", "flat tensor"), "source": ("weights", "point", "flat tensor"), "point": ("weights", "flat tensor"),
    "names": ("probe", "matches no parameter"), "name": ("probe",), "V": ("matrix", "vector"), "path": ("file", "folder"), "folder": ("file", "folder"), "records_or_folder": ("file", "folder", "Record"),
    "matmat": ("matmat",), "prior": ("weights", "point", "flat tensor"), "optimizer": ("optimizer",), "data": ("batch", "data"),
}  # fmt: skip

# (call, parameter, label) -> why such a value is right; "any ..." where the call is not even tried
MEASURED = r"Estimate|Eigenpairs|Density|Spectrum|Curve|Surface|Table|Point|Record|Edge|Alignment|Subject"
FINE: dict[tuple[str, str, str], str] = {
    (r".*", r"seed|momentum|weight_decay|curve_epochs|prior_samples|noise|index", r"0"): "zero is a right value",
    (r".*", r"tags", r"a value that is (0|-1|NaN|inf|-inf|numpy NaN)"): "a tag is any number",
    (r"(Line|Bezier|PolyChain|Plane)\..*", r"s|t", r"0|-1"): "a path and a plane go on beyond their ends",
    (r"Density\..*", r"x|low|high", r"0|-1|inf|-inf|NaN|too short|four axes|empty|bools"): "a density can be asked for at any numbers",
    (r".*", r"folder|records_or_folder", r"a folder"): "records are added to a folder that is there",
    (r"Records.__getitem__", r"index", r"-1"): "counted from the end, as in a list",
    (MEASURED, r".*", r"(a value that is )?(NaN|numpy NaN|inf|-inf|0|-1)"): "a measured value may be any number, also unknown or infinite",
    (MEASURED, r".*", r"(a value that is )?(empty|bools|too short|four axes|empty path)"): "a measured tensor may have any values, where its axes fit",
    (MEASURED, r".*", r"empty text|empty"): "a label may be empty",
}


def tally(found: Iterable[Outcome]) -> Counter[str]:
    """How many calls ended in which way."""
    return Counter(outcome.kind for outcome in found)
