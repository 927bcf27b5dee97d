"""Checkpoints of long iterations: a dict of tensors and a JSON description of the job, in one safetensors file.

A job killed at any moment finds on disk either the previous complete state or the new one, never half of each.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .operator import LinearOperator

State = dict[str, Tensor]
OVERHEAD = 0.05  # share of the running time that saving may take


def job_description(op: LinearOperator, path: str | Path | None, **settings: Any) -> dict[str, Any]:
    """What must agree for a state at `path` to be continued: the operator's size, dtype, origin and one product, and the `settings`.

    The product, of a fixed random vector, tells one matrix from another; it is not counted. Without a path there is no job.
    """
    if path is None:
        return {}
    vector = op.space.sample(0, 0, "normal")
    image = op.matmat(vector[:, None])[:, 0].detach()
    product = [float(op.space.inner(vector, image)), float(op.space.norm(image))]
    about = {key: value for key, value in op.about.items() if _is_json(value)}
    return {"size": op.size, "dtype": str(op.dtype), "about": about, "product": product, **settings}


def save_checkpoint(path: str | Path, state: Mapping[str, Tensor], job: Mapping[str, Any]) -> None:
    """Write `state` and `job` to `path` atomically: temporary file in the same folder, fsync, rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    tensors = {name: tensor.detach().contiguous().cpu().clone() for name, tensor in state.items()}  # clone: no shared storage
    try:
        save_file(tensors, partial, metadata={"job": json.dumps(job, sort_keys=True)})
        _flush(partial)
        os.replace(partial, path)
        _flush(path.parent)  # the rename itself
    finally:
        partial.unlink(missing_ok=True)


def load_checkpoint(path: str | Path, job: Mapping[str, Any]) -> State | None:
    """The state saved at `path`, on the CPU, or None where there is no file. ValueError if it is another job's or damaged."""
    path = Path(path)
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            saved = json.loads((file.metadata() or {})["job"])
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (aligned memory: BLAS rounds by it)
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(f"checkpoint={str(path)!r} is no checkpoint of Orograph ({error}). Delete it or give another path.") from error
    asked = json.loads(json.dumps(job))
    differing = [key for key in sorted({*saved, *asked}) if not _agree(saved.get(key), asked.get(key))]
    if differing:
        what = "; ".join(f"{key} is {saved.get(key)!r} there and {asked.get(key)!r} here" for key in differing)
        raise ValueError(f"checkpoint={str(path)!r} belongs to another job: {what}. Delete it or give another path.")
    return state


@contextmanager
def checkpointing(path: str | Path | None, job: Mapping[str, Any]) -> Iterator[tuple[State | None, Callable[[State], None]]]:
    """Yield the state saved at `path` (on the CPU; or None) and `keep(state)`, to be called with every complete new state.

    `keep` saves when the time since the last save exceeds 1 / OVERHEAD times what a save takes; the last state is saved on
    leaving, after an exception or KeyboardInterrupt too. States kept must not be changed in place afterwards.
    """
    if path is None:
        yield None, lambda state: None
        return
    found = load_checkpoint(path, job)
    unsaved: State | None = None
    duration, finished = 0.0, -1.0

    def write(state: State) -> None:
        nonlocal unsaved, duration, finished
        began = time.monotonic()
        save_checkpoint(path, state, job)
        unsaved, finished = None, time.monotonic()
        duration = finished - began

    def keep(state: State) -> None:
        nonlocal unsaved
        unsaved = state
        if time.monotonic() - finished > duration / OVERHEAD:
            write(state)

    try:
        yield found, keep
    finally:
        if unsaved is not None:
            write(unsaved)


def _flush(path: Path) -> None:
    """Force a file or folder to disk; Windows cannot open folders and needs no such step."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _agree(saved: Any, asked: Any) -> bool:
    """Equal; numbers of a product up to the round-off of another thread count."""
    if isinstance(saved, list) and isinstance(asked, list):
        return len(saved) == len(asked) and all(math.isclose(a, b, rel_tol=1e-3) for a, b in zip(saved, asked, strict=True))
    return bool(saved == asked)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
