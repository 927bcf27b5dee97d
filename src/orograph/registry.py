"""Probes by name: a function that takes a `Subject` and returns results becomes a command, a record and a section of the report.

To add one: a file in `probes/` (or in your own code) with a function under `@probe`; nothing else needs to change.
"""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from .checks import check_settings, checked, refusal
from .durable import fingerprint
from .identity import function_identity, identity_of, metrics_identity, point_identity, short_hash
from .objective import Objective
from .progress import Progress
from .ranges import bound, corrected, names_of
from .records import Record, Records
from .results import Density, Eigenpairs, Estimate, Point, Result, Spectrum, Surface, Table, worst_status
from .subject import Shared, Subject

Results = Mapping[str, Result]
Says = Callable[[Results], str]
F = TypeVar("F", bound=Callable[..., dict[str, Result]])


@dataclass(frozen=True)
class Probe:
    """A registered measurement."""

    name: str
    function: Callable[..., dict[str, Result]]
    says: Says | None

    @property
    def points(self) -> list[str]:
        """Names of the networks that it takes beside the subject; "*points" for any number."""
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        found = [p for p in self._parameters()[1:] if p.kind in kinds]
        return [f"*{p.name}" if p.kind is inspect.Parameter.VAR_POSITIONAL else p.name for p in found]

    @property
    def settings(self) -> dict[str, Any]:
        """Names and defaults of its settings."""
        return {p.name: list(p.default) if isinstance(p.default, tuple) else p.default for p in self._parameters() if p.kind is inspect.Parameter.KEYWORD_ONLY}

    @property
    def summary(self) -> str:
        """First line of its docstring."""
        return (inspect.getdoc(self.function) or "").split("\n")[0]

    def _parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())


_probes: dict[str, Probe] = {}


@overload
def probe(function: F) -> F: ...
@overload
def probe(*, says: Says | None = None) -> Callable[[F], F]: ...
@checked
def probe(function: Callable[..., Any] | None = None, *, says: Says | None = None) -> Any:
    """Register a measurement under the function's name: `f(subject, *points, *, settings) -> {name: result}`.

    `subject` is a `Subject`; the networks that the probe compares are positional parameters, its settings keyword-only with JSON
    defaults. `says(results)` turns the results into one plain sentence, which is stored with them.
    """

    def register(f: F) -> F:
        new = Probe(f.__name__, f, says)
        known = _probes.get(new.name)
        if known is not None and (known.function.__module__, known.function.__qualname__) != (f.__module__, f.__qualname__):
            raise ValueError(f"@probe: there is already a probe {new.name!r}, in {known.function.__module__}. Choose another name.")
        _probes[new.name] = new
        return f

    return register if function is None else register(function)


def list_probes() -> list[str]:
    """Names of all registered probes."""
    return sorted(_probes)


def find_probe(name: str) -> Probe:
    """The probe called `name`."""
    if not isinstance(name, str):
        raise TypeError(f"a probe is asked for by its name, got {type(name).__name__}. Several at once: measure_all(objective, [names]).")
    if name not in _probes:
        near = difflib.get_close_matches(name, _probes, 1)
        raise ValueError(f"there is no probe {name!r}. {f'Did you mean {near[0]!r}? ' if near else ''}There are: {', '.join(list_probes())}.")
    return _probes[name]


@checked
def measure(
    objective: Objective,
    name: str,
    *points: Any,
    held_out: Objective | None = None,
    tags: Mapping[str, str | int | float] | None = None,
    progress: Progress = None,
    **settings: Any,
) -> Record:
    """Run one probe and record what it found, with settings and provenance.

    One-point probes measure where the objective stands; the others take every network explicitly, as anything that
    `objective.point` takes. `held_out`: the same loss on other data · `tags`: what tells this record from its siblings ·
    `settings`: the probe's own. Raises TypeError for missing or surplus networks and unknown settings.
    """
    return _measure(Subject(objective, held_out, progress), find_probe(name), points, dict(tags or {}), settings, {})[0]


@checked
def measure_all(
    objective: Objective,
    names: Iterable[str],
    *points: Any,
    held_out: Objective | None = None,
    tags: Mapping[str, str | int | float] | None = None,
    progress: Progress = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> Records:
    """Run several probes that share operators and what was found with them; `settings`: probe name -> its settings.

    Points go to the probes that take some. Each record says the products that it spent and those of others that it could use.
    """
    return Records(record for record, _ in measure_each(objective, names, *points, held_out=held_out, tags=tags, progress=progress, settings=settings))


def measure_each(
    objective: Objective,
    names: Iterable[str],
    *points: Any,
    held_out: Objective | None = None,
    tags: Mapping[str, str | int | float] | None = None,
    progress: Progress = None,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    saved: Mapping[str, Record] | None = None,
) -> Iterator[tuple[Record, bool]]:
    """`measure_all`, record by record, in the order asked for, each as soon as it is there; and whether it is new, or one of those `saved` (by `provenance["job"]`)."""
    chosen = [find_probe(name) for name in names]
    if not chosen or len({one.name for one in chosen}) < len(chosen):
        raise refusal("measure_all", "names", names, f"the names of probes, each once. There are: {', '.join(list_probes())}.")
    strangers = set(settings or {}) - {p.name for p in chosen}
    if strangers:
        raise ValueError(f"measure_all(settings=...) names {', '.join(sorted(strangers))}, which is not among the probes asked for.")
    shared, waiting = Shared(), [one.name for one in chosen]
    found: dict[str, tuple[Record, bool]] = {}
    for one in sorted(chosen, key=lambda one: one.name != "spectrum"):  # first: the others can use its products
        subject = Subject(objective, held_out, progress, shared)
        found[one.name] = _measure(subject, one, points if one.points else (), dict(tags or {}), dict((settings or {}).get(one.name, {})), saved or {})
        while waiting and waiting[0] in found:
            yield found.pop(waiting.pop(0))


@checked
def connect(objective: Objective, a: Any, b: Any, *, held_out: Objective | None = None, progress: Progress = None, **settings: Any) -> Record:
    """How two networks are connected, and their merged network: `measure(objective, "connectivity", a, b)`; `record["merged"]` is a Point."""
    return measure(objective, "connectivity", a, b, held_out=held_out, progress=progress, **settings)


def _measure(
    subject: Subject, one: Probe, points: tuple[Any, ...], tags: dict[str, str | int | float], settings: dict[str, Any], saved: Mapping[str, Record]
) -> tuple[Record, bool]:
    """The record of one probe, and whether it is new."""
    networks = _networks(subject, one, points)
    unknown = set(settings) - set(one.settings)
    if unknown:
        raise TypeError(f"{one.name} has no setting {', '.join(sorted(unknown))}. It has: {', '.join(one.settings) or 'none'}.")
    settings = check_settings(one.function, one.name, settings)
    described = one.settings | {name: _described(value) for name, value in settings.items()}
    job = _job(subject, one, networks, described, tags)
    if job in saved:
        return saved[job], False
    before, began = subject.shared.products, time.perf_counter()
    results = {name: _possible(name, result) for name, result in one.function(subject, *networks, **settings).items()}
    spent = subject.shared.products - before
    statuses = [result.status for result in results.values() if isinstance(result, (Estimate, Eigenpairs, Density, Spectrum, Surface))]
    record = Record(
        probe=one.name,
        results=results,
        says=one.says(results) if one.says is not None else "",
        missing=dict(subject.missing),
        settings=described,
        tags=tags,
        provenance=_provenance(subject) | {"job": job} | ({} if one.points else {"loss": subject.once("loss", subject.objective.value)}),
        products=spent,
        reused=subject.reused,
        seconds=time.perf_counter() - began,
        status=worst_status(statuses),
        label=_label(networks) or subject.objective.label,
    )
    return record, True


def _job(subject: Subject, one: Probe, networks: list[Point], settings: Mapping[str, Any], tags: Mapping[str, Any]) -> str:
    """A hash of what a record depends on, its label and tags included; not of the place of a store, nor of device, threads or memory."""
    sides = [[identity_of(side, ordered=True), metrics_identity(side)] for side in (subject.objective, subject.held_out) if side is not None]
    points = [[point_identity(point), point.label] for point in networks]
    kept = sorted((name, value) for name, value in settings.items() if name != "store")
    return short_hash(one.name, function_identity(one.function), kept, sorted(tags.items()), subject.objective.label, sides, points, version("orograph"))


def _possible(name: str, result: Result) -> Result:
    """A result within what its quantities can be; intervals are then, too."""
    if isinstance(result, Table):
        return replace(result, rows=[_possible_row(row) for row in result.rows])
    if not isinstance(result, Estimate) or isinstance(result.value, Tensor):
        return result
    value = corrected(result.value, (name,), float(result.sem))
    least, most = (bound(end, value, (name,)) for end in (result.least, result.most))
    return replace(result, value=value, least=least, most=most)


def _possible_row(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table whose numbers are within what their columns, or the names beside them, say that they are."""
    error = row.get("error")
    own = error if isinstance(error, float) else 0.0
    possible = dict(row)
    for key, value in row.items():
        if isinstance(value, float):
            possible[key] = corrected(value, names_of(row, key), own if key == "value" else 0.0)
    return possible


def _label(networks: list[Point]) -> str:
    """Names of the networks that are compared; of many the first and the last."""
    names = [point.label for point in networks]
    return " – ".join(names) if len(names) <= 3 else f"{names[0]} – {names[-1]} ({len(names)} networks)"


def _described(value: Any) -> Any:
    """A setting as a record keeps it: JSON as it is, networks by name and fingerprint of their weights, all else by type."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Point):
        return f"Point {value.label!r}, weights {fingerprint([value.theta, *value.buffers.values(), *value.frozen.values()])}"
    if isinstance(value, Objective):
        return f"Objective {value.label!r}, weights {value.fingerprints()['weights']}"
    if isinstance(value, nn.Module):
        return f"{type(value).__name__}, weights {fingerprint(t for t in value.state_dict().values() if isinstance(t, Tensor))}"
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}, {fingerprint([value])}"
    if isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values()):
        return f"state dict, weights {fingerprint(t for t in value.values() if isinstance(t, Tensor))}"
    if isinstance(value, Mapping):
        return {str(key): _described(item) for key, item in value.items()}
    return [_described(item) for item in value] if isinstance(value, tuple | list) else f"<{type(value).__name__}>"


def _networks(subject: Subject, one: Probe, points: tuple[Any, ...]) -> list[Point]:
    """The points given to a probe, read; TypeError if they are too few or too many."""
    if subject.held_out is not None and subject.held_out.terms().batches.reading.fingerprint == subject.objective.terms().batches.reading.fingerprint:
        raise ValueError("held_out holds the very data of the objective, so it tells nothing new. Use held_out=objective.on(other_data).")
    if subject.held_out is not None and subject.held_out.names != subject.objective.names:
        raise ValueError("held_out is an objective of other parameters. Make it with objective.on(other_data).")
    if subject.held_out is not None and str(subject.held_out.recipe.model) != str(subject.objective.recipe.model):
        raise ValueError("held_out is an objective of another architecture. Make it with objective.on(other_data).")
    wanted = one.points
    if not any(name.startswith("*") for name in wanted) and len(points) != len(wanted):
        if not wanted:
            raise TypeError(f"{one.name} measures the objective's own point and takes no further network. Use measure(objective.at(network), {one.name!r}).")
        lacking = wanted[len(points) :]
        problem = f"missing: {', '.join(lacking)}" if lacking else f"{len(points)} given"
        raise TypeError(f"{one.name} compares {len(wanted)} networks ({', '.join(wanted)}); {problem}. Use measure(objective, {one.name!r}, {', '.join(wanted)}).")
    names = [*wanted, *("" for _ in points)]
    read = [subject.objective.network(point) for point in points]
    defaults = [name if name and not name.startswith("*") else str(i + 1) for i, name in enumerate(names)]
    alike = len({point.label for point in read}) < len(read)
    return [replace(point, label=f"{point.label} {default}") if alike else point for point, default in zip(read, defaults, strict=False)]


def _provenance(subject: Subject) -> dict[str, Any]:
    objective = subject.objective
    operators = {name: {key: value for key, value in op.about.items() if key != "fingerprints"} | {"memory": op.memory} for name, op in subject.shared.operators.items()}
    return {
        "orograph": version("orograph"),
        "torch": torch.__version__,
        "device": str(objective.device),
        "dtype": str(objective.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "mode": objective.mode,
        "isolation": objective.isolation,
        "parameters": objective.size,
        "examples": objective.examples,
        "units": objective.units,
        "fingerprints": objective.fingerprints(),
        "operators": operators,
    }
