import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from orograph.linalg.checkpoints import checkpointing, load_checkpoint, save_checkpoint
from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import trace

F64 = torch.float64
METHODS = ["hutchinson", "hutch++", "xtrace", "auto"]


def decay(n):
    return torch.arange(1, n + 1, dtype=F64) ** -2


def operator(values, dtype=F64, **settings):
    values = values.to(dtype)
    return LinearOperator(lambda V: values[:, None] * V, len(values), dtype, **settings)


JOB = """
import sys, time, torch
from orograph.linalg.operator import LinearOperator
from orograph.linalg.traces import trace
path, method, pause = sys.argv[1], sys.argv[2], float(sys.argv[3])
values = torch.arange(1, 201, dtype=torch.float64) ** -1.0
def matmat(V):
    time.sleep(pause)
    return values[:, None] * V
def job(pause=0.0):
    op = LinearOperator(matmat, 200)
    return op, trace(op, method=method, rel_error=1e-9, max_products=150, checkpoint=path or None)
"""


@pytest.mark.parametrize("method", METHODS)
def test_job_killed_and_restarted_gives_the_same_bits(method, tmp_path):
    path = tmp_path / "trace.safetensors"
    child = subprocess.Popen([sys.executable, "-c", JOB + "job()", str(path), method, "0.05"])
    deadline = time.monotonic() + 60
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    rerun = restarted(path, method)
    op, resumed = rerun["job"]()
    _, undisturbed = restarted("", method)["job"]()
    assert resumed == undisturbed
    assert 0 < op.products < resumed.products == 150
    assert [file.name for file in tmp_path.iterdir() if not file.name.startswith(".")] == [path.name]


def restarted(path, method):
    scope = {}
    argv, sys.argv = sys.argv, ["job", str(path), method, "0"]
    try:
        exec(JOB, scope)
    finally:
        sys.argv = argv
    return scope


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_interrupt_saves_what_was_spent(method, tmp_path):
    path = tmp_path / "deep" / "trace.safetensors"
    values, calls = decay(200), []

    def matmat(V):
        calls.append(V.shape[1])
        if len(calls) == 10:  # the first few tell one matrix from another, and prove that it is symmetric
            raise KeyboardInterrupt
        return values[:, None] * V

    settings = {"method": method, "rel_error": None, "max_products": 90, "checkpoint": path}
    with pytest.raises(KeyboardInterrupt):
        trace(LinearOperator(matmat, 200), **settings)
    op = LinearOperator(matmat, 200)
    resumed = trace(op, **settings)
    assert op.products < 90 == resumed.products
    assert resumed == trace(LinearOperator(matmat, 200), **{**settings, "checkpoint": None})
    again = LinearOperator(matmat, 200)
    assert trace(again, **settings) == resumed
    assert again.products == 0


def test_exact_trace_resumes_too(tmp_path):
    path = tmp_path / "trace.safetensors"
    settings = {"rel_error": None, "max_products": 100, "checkpoint": path}
    first = trace(operator(decay(30)), **settings)
    op = operator(decay(30))
    assert trace(op, **settings) == first
    assert op.products == 0


def test_checkpoint_of_another_job_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    trace(operator(decay(30)), max_products=20, checkpoint=path)
    with pytest.raises(ValueError, match=r"belongs to another job: seed is 0 there and 1 here. Delete it"):
        trace(operator(decay(30)), max_products=20, checkpoint=path, seed=1)
    with pytest.raises(ValueError, match=r"dtype is 'torch.float64' there.*size is 30 there and 31 here"):
        trace(operator(decay(31), torch.float32), max_products=20, checkpoint=path)
    with pytest.raises(ValueError, match="curvature is None there and 'ggn' here"):
        trace(operator(decay(30), about={"curvature": "ggn", "note": object()}), max_products=20, checkpoint=path)


def test_damaged_checkpoint_is_refused(tmp_path):
    path = tmp_path / "trace.safetensors"
    path.write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is no checkpoint of Orograph"):
        trace(operator(decay(30)), max_products=20, checkpoint=path)


def test_state_comes_back_to_the_last_bit(tmp_path):
    path = Path(tmp_path) / "state"
    state = {"a": torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T, "empty": torch.zeros(4, 0), "count": torch.tensor(3)}
    assert load_checkpoint(path, {"n": 1}) is None
    save_checkpoint(path, state, {"n": 1})
    loaded = load_checkpoint(path, {"n": 1})
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_saving_takes_a_small_share_of_the_time(tmp_path, monkeypatch):
    saves, clock = [], [0.0]
    monkeypatch.setattr("orograph.linalg.checkpoints.time.monotonic", lambda: clock[0])

    def slow_save(path, state, job):
        saves.append(int(state["step"]))
        clock[0] += 1.0

    monkeypatch.setattr("orograph.linalg.checkpoints.save_checkpoint", slow_save)
    with checkpointing(tmp_path / "state", {}) as (_, keep):
        for step in range(100):
            clock[0] += 1.0
            keep({"step": torch.tensor(step)})
    assert saves[-1] == 99
    assert len(saves) <= 7
