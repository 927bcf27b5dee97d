"""Checkpoints of long jobs: a dict of tensors and a JSON description of the job, in one safetensors file with its own SHA-256.

A job is identified by what changes its result, and by nothing else: its task and settings, where the operator comes from (hashes of weights, data,
loss and model), and products of random vectors. A job killed at any moment finds on disk the previous complete state or the new one.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..durable import fingerprint, read_tensors, remove_leftovers, sole_owner, write_tensors
from ..errors import OrographWarning
from .operator import LinearOperator

State = dict[str, Tensor]
OVERHEAD = 0.05  # share of the running time that saving may take
PRODUCTS, PROJECTIONS = 2, 8  # random vectors that the operator is applied to, and those that each image is projected on
FLOOR = 1e-10  # relative difference of products that no double precision is sure to be free of
SLACK = 50.0  # multiples of an operator's noise by which two products of one matrix may differ: other engines, other numbers of threads


def job_description(op: LinearOperator, path: str | Path | None, **settings: Any) -> dict[str, Any]:
    """What must agree for a state at `path` to be continued: `settings`, the operator's origin, and products of random vectors.

    Of `op.about`, "curvature", "seed" and "fingerprints" say which matrix it is; the rest says how its products are made. Tensors among the settings are hashed. The products, which are not counted, tell one matrix from another where its origin is unknown. Without a
    path there is no job.
    """
    if path is None:
        return {}
    about = {"curvature": op.about.get("curvature"), "seed of the operator": op.about.get("seed"), **dict(op.about.get("fingerprints", {}))}
    origin = {key: value for key, value in about.items() if isinstance(value, str | int | float)}
    described = {name: fingerprint([value]) if isinstance(value, Tensor) else value for name, value in settings.items()}
    return {"size": op.size, "dtype": str(op.dtype), **origin, **described, "product": _projections(op)}


def measured(values: list[float], norms: list[float], noise: float) -> dict[str, Any]:
    """Numbers as part of a description: they agree up to `SLACK` times `noise` times their norms."""
    return {"values": values, "norms": norms, "noise": noise}


def _projections(op: LinearOperator) -> dict[str, Any]:
    values: list[float] = []
    norms: list[float] = []
    for j in range(PRODUCTS):
        image = op.matmat(op.space.sample(0, j, "normal")[:, None])[:, 0].detach()
        values += [float(op.space.inner(op.space.sample(1, i, "normal"), image)) for i in range(PROJECTIONS)]
        norms += [float(op.space.norm(image))] * PROJECTIONS
    return measured(values, norms, op.noise)


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], job: Mapping[str, Any]) -> None:
    """Write `state` and `job` to `path` atomically. OSError where that fails: what was there before stays."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(Path(path), state, {"job": json.dumps(job, sort_keys=True)})


def load_checkpoint(path: str | Path, job: Mapping[str, Any]) -> State | None:
    """The state saved at `path`, on the CPU, or None where there is no file. ValueError if it is another job's, damaged, or cannot be read."""
    path = Path(path)
    try:
        state, metadata = read_tensors(path, sealed=True)
        saved = json.loads(metadata["job"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"checkpoint={str(path)!r} cannot be read: {error.strerror or error}. Give the name of a file that can, or of a new one.") from error
    except (KeyError, ValueError) as error:
        raise ValueError(f"checkpoint={str(path)!r} is no checkpoint of Orograph ({error}). Delete it or give another path.") from error
    differing = _differences(saved, json.loads(json.dumps(job)))
    if differing:
        raise ValueError(f"checkpoint={str(path)!r} belongs to another job: {'; '.join(differing)}. Delete it or give another path.")
    return state


def _differences(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What two descriptions disagree in, in words; products only where all else agrees."""
    keys = sorted({*saved, *asked})
    numbers = [key for key in keys if isinstance(saved.get(key), dict) and isinstance(asked.get(key), dict)]
    words = [f"{key} is {saved.get(key)!r} there and {asked.get(key)!r} here" for key in keys if key not in numbers and saved.get(key) != asked.get(key)]
    if words:
        return words
    return [f"{key} is another one, by {_gap(saved[key], asked[key])[0]:.2g} of its size" for key in numbers if not agree(saved[key], asked[key])]


def agree(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether two `measured` numbers differ by no more than rounding explains."""
    gap, allowed = _gap(saved, asked)
    return gap <= allowed


def _gap(saved: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[float, float]:
    """Largest difference of measured numbers, relative to their norms, and the one that rounding explains."""
    there, here, norms = (torch.tensor(part, dtype=torch.float64) for part in (saved["values"], asked["values"], asked["norms"]))
    if there.shape != here.shape:
        return float("inf"), 0.0
    same = (there == here) | (there.isnan() & here.isnan())
    gap = float(torch.where(same, 0.0, (there - here).abs() / norms.clamp(min=1e-300)).max())
    return gap, max(SLACK * max(saved["noise"], asked["noise"]), FLOOR)


class Keep(Protocol):
    """Takes a complete new state; with `now`, saves it at once."""

    def __call__(self, state: State, *, now: bool = False) -> None: ...


def _keep_nothing(state: State, *, now: bool = False) -> None:
    """There is no file."""


@contextmanager
def checkpointing(path: str | Path | None, job: Mapping[str, Any]) -> Iterator[tuple[State | None, Keep]]:
    """Yield the state saved at `path` (on the CPU; or None) and `keep(state)`, to be called with every complete new state.

    `keep` saves when the time since the last save exceeds 1 / OVERHEAD times what a save takes; the last state is saved on
    leaving, after an exception or KeyboardInterrupt too. States kept must not be changed in place afterwards, unless after `keep(state, now=True)`. A save that fails (no room, no
    permission) ends no job: it is warned of once and tried again, and what is not on disk at the end is said. One process at a time has a path.
    """
    if path is None:
        yield None, _keep_nothing
        return
    path = Path(path)
    if path.parent.exists() and not path.parent.is_dir():
        raise ValueError(f"checkpoint={str(path)!r}: {str(path.parent)!r} is a file, not a folder. Give another path.")
    with sole_owner(path, "checkpoint"):
        remove_leftovers(path.parent)
        saving = _Saving(path, job)
        found = load_checkpoint(path, job)
        try:
            yield found, saving.keep
        finally:
            saving.finish()


@dataclass
class _Saving:
    """When a job's states are saved, and what to say where that fails."""

    path: Path
    job: Mapping[str, Any]
    unsaved: State | None = None
    dropped: bool = False  # a state that could not be saved is gone
    duration: float = 0.0  # of the last save
    tried: float = -1.0  # when it ended
    saved: float | None = None  # when the last one that succeeded ended
    problem: str = ""  # of the first one that failed
    began: float = field(default_factory=time.monotonic)

    def keep(self, state: State, *, now: bool = False) -> None:
        self.unsaved = state
        if now or time.monotonic() - self.tried > self.duration / OVERHEAD:
            self.write(state)
        if now and self.unsaved is not None:  # its tensors are about to be overwritten
            self.unsaved, self.dropped = None, True

    def write(self, state: State) -> None:
        began = time.monotonic()
        try:
            save_checkpoint(self.path, state, self.job)
            self.unsaved, self.dropped, self.saved = None, False, time.monotonic()
        except OSError as error:
            if not self.problem:
                self.problem = error.strerror or str(error)
                warnings.warn(f"checkpoint={str(self.path)!r} cannot be saved ({self.problem}). The job goes on, and saving is tried again.", OrographWarning, stacklevel=2)
        self.tried = time.monotonic()
        self.duration = self.tried - began

    def finish(self) -> None:
        if self.unsaved is not None:
            self.write(self.unsaved)
        if self.unsaved is None and not self.dropped:
            return
        lost = "nothing of this run is" if self.saved is None else f"what was computed in the last {time.monotonic() - self.saved:.3g} s is not"
        warnings.warn(f"checkpoint={str(self.path)!r} could not be saved ({self.problem}): {lost} on disk, and would be computed again. Make room there, or give another path.", OrographWarning, stacklevel=2)
