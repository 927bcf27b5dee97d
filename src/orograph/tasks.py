"""What `orograph measure` is given: a Python file that makes objectives, checkpoints of its network, and settings of probes."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from .durable import write_atomically
from .exports import FORMATS, save_surface
from .objective import Objective
from .progress import Progress
from .records import Record
from .registry import find_probe, measure_each
from .results import Point, Surface, Table

Settings = dict[str, dict[str, Any]]  # probe -> setting -> value
UNREADABLE = (OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError)  # what damaged weights files raise


@dataclass(frozen=True)
class Job:
    """One run: which `probes` with which `settings`, on which objective, at which `weights` files (none: at its own point)."""

    objective: Objective
    held_out: Objective | None
    probes: tuple[str, ...]
    settings: Settings
    weights: tuple[Path, ...] = ()


def import_task(file: Path) -> ModuleType:
    """Run a task file, as `python FILE` would find its imports. Its probes are registered by that."""
    if not file.is_file() or file.suffix != ".py":
        raise FileNotFoundError(f"TASK is a Python file with objective() in it, and there is no such file {file}.")
    folder, name = str(file.resolve().parent), f"orograph_task_{file.stem}"
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None  # it is a .py file
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not callable(getattr(module, "objective", None)):
        raise ValueError(f"{file} has no objective(). Define it there: def objective(): return Objective(model, criterion, data).")
    return module


def make_objective(module: ModuleType, name: str, device: str | None) -> Objective:
    """The Objective that the task's function `name` returns; on `device`, where one is asked for."""
    function = getattr(module, name)
    parameters = inspect.signature(function).parameters.values()
    takes = any(p.name == "device" or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    made = function(device=device) if device is not None and takes else function()
    if not isinstance(made, Objective):
        raise TypeError(f"{name}() of the task returned a {type(made).__name__}. It must return an orograph.Objective.")
    if device is not None and torch.empty(0, device=device).device != torch.empty(0, device=made.device).device:
        cure = "Hand it on: Objective(..., device=device)." if takes else f'Let the task take it: def {name}(device="cpu").'
        raise ValueError(f"--device {device}: {name}() of the task made an objective on {made.device}. {cure}")
    return made


def check_device(device: str) -> None:
    """ValueError if torch cannot put a tensor there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from error


def read_settings(texts: Sequence[str], probes: Sequence[str], seed: int | None) -> Settings:
    """Settings out of texts such as "spectrum.k=20": JSON values, or text; `seed` for every probe that has one and is given none."""
    settings: Settings = {}
    for text in texts:
        key, equals, value = text.partition("=")
        name, dot, setting = key.strip().partition(".")
        if not (name and dot and setting and equals):
            raise ValueError(f"--set {text} is not of the form PROBE.SETTING=VALUE, such as spectrum.k=20.")
        if name not in probes:
            raise ValueError(f"--set {text}: {find_probe(name).name} is not among the probes asked for ({', '.join(probes)}).")
        known = find_probe(name).settings
        if setting not in known:
            raise ValueError(f"--set {text}: {name} has no setting {setting!r}. It has: {', '.join(known) or 'none'}.")
        settings.setdefault(name, {})[setting] = _value(value)
    for name in probes if seed is not None else ():
        if "seed" in find_probe(name).settings:
            settings.setdefault(name, {}).setdefault("seed", seed)
    return settings


def check_probes(probes: Sequence[str], networks: int) -> None:
    """ValueError for a probe that does not exist, or that compares another number of networks than there are checkpoints."""
    for one in map(find_probe, probes):
        fixed = bool(one.points) and not any(name.startswith("*") for name in one.points)
        if fixed and len(one.points) != networks:
            raise ValueError(f"{one.name} compares {len(one.points)} networks ({', '.join(one.points)}): give --weights {len(one.points)} times. It was given {networks} times.")


def check_files(files: Sequence[Path]) -> None:
    """ValueError for a checkpoint given twice, FileNotFoundError for one that is not there."""
    for file, count in Counter(file.resolve() for file in files).items():
        if count > 1:
            raise ValueError(f"--weights {file.name} is given {count} times. Give every checkpoint once.")
        if not file.is_file():
            raise FileNotFoundError(f"--weights: there is no file {file}.")


def read_checkpoint(objective: Objective, file: Path, label: str) -> Point:
    """A weights file as a Point. It is read as data: nothing in it is executed."""
    try:
        return objective.point(file, label=label)
    except UNREADABLE as error:
        raise ValueError(f"--weights {file}: {error}") from error


def distinct_labels(files: Sequence[Path]) -> list[str]:
    """The stem of each file; with its folder and suffix where stems are alike."""
    labels = [file.stem for file in files]
    for depth in range(1, max((len(file.resolve().parts) for file in files), default=0)):
        counts = Counter(labels)
        longer = ["/".join(file.resolve().parts[-depth:]) for file in files]
        labels = [label if counts[label] == 1 else other for label, other in zip(labels, longer, strict=True)]
    return labels


def run_job(job: Job, saved: Mapping[str, Record], progress: Progress = None) -> Iterator[tuple[Record, bool]]:
    """Measure checkpoint by checkpoint, and last what compares them: each record as soon as it is there, and whether it is new or one of those `saved`."""
    if not job.weights:
        yield from measure_each(job.objective, job.probes, held_out=job.held_out, progress=progress, settings=job.settings, saved=saved)
        return
    labels = dict(zip(job.weights, distinct_labels(job.weights), strict=True))
    for file, label in labels.items():
        read_checkpoint(job.objective, file, label)  # all of them first: a wrong one shows before the work; none is kept in memory
    alone = len(job.weights) == 1  # a probe of any number of networks then stands at that one
    comparing = [name for name in job.probes if find_probe(name).points and not (alone and find_probe(name).points[0].startswith("*"))]
    single = [name for name in job.probes if name not in comparing]
    for file, label in labels.items() if single else ():
        point = read_checkpoint(job.objective, file, label)
        held_out = job.held_out.at(point) if job.held_out is not None else None
        for record, new in measure_each(job.objective.at(point), single, held_out=held_out, progress=progress, settings=_of(job.settings, single), saved=saved):
            yield _from_files(record, [file]), new
    if comparing:
        points = [read_checkpoint(job.objective, file, label) for file, label in labels.items()]
        for record, new in measure_each(job.objective, comparing, *points, held_out=job.held_out, progress=progress, settings=_of(job.settings, comparing), saved=saved):
            yield _from_files(record, job.weights), new


def picture_stem(record: Record) -> str:
    """A file name that tells pictures of different planes apart: "surface", "surface-eigenvectors", "surface-three-networks", "trajectory"."""
    if record.probe != "surface":
        return record.probe
    axes, points = str(record.settings.get("axes", "random")), record.results.get("points")
    if record.settings.get("plane") is not None or (isinstance(points, Table) and len(points.rows) == 3):
        return "surface-plane" if record.settings.get("plane") is not None else "surface-three-networks"
    return "surface" if axes == "random" else f"surface-{axes}"


def count_lines(path: Path) -> int:
    """Samples in a store."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def save_pictures(record: Record, folder: Path, stem: str) -> list[Path]:
    """The surface of a record in every format: data, and figures with its networks marked where matplotlib is installed."""
    surface = record["surface"]
    assert isinstance(surface, Surface)
    marks = record.results.get("path", record.results.get("points"))
    endings = FORMATS + ((".png", ".svg") if importlib.util.find_spec("matplotlib") else ())
    return [save_surface(surface, folder / f"{stem}{ending}", marks=marks if isinstance(marks, Table) else None) for ending in endings]


def save_weights(state: Mapping[str, Any], path: Path) -> None:
    """A state dict as a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda partial: save_file({name: tensor.contiguous() for name, tensor in state.items()}, partial))


def _of(settings: Settings, probes: Sequence[str]) -> Settings:
    return {name: values for name, values in settings.items() if name in probes}


def _from_files(record: Record, files: Sequence[Path]) -> Record:
    """The same record, which says where the weights came from."""
    return replace(record, provenance=record.provenance | {"weights": ", ".join(map(str, files))})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
