"""Whatever a caller has switched on changes neither the numbers nor the certificate of a measurement."""

import contextlib
import itertools

import pytest
import torch
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import orograph as og
from orograph import Objective

from .families import rotating
from .interrupting import process_state
from .test_interrupts import Mixed, X, Y


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def half(tensor):
    return tensor.to(torch.bfloat16)


CONTEXTS = {
    "inference mode": lambda: torch.inference_mode(), "no grad": lambda: torch.no_grad(), "grad off by a call": lambda: torch.set_grad_enabled(False),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16), "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=True),
    "default dtype float64": lambda: default_dtype(torch.float64), "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device meta": lambda: default_device("meta"), "a device context": lambda: torch.device("meta"), "deterministic algorithms": deterministic,
    "saved tensors rounded": lambda: torch.autograd.graph.saved_tensors_hooks(half, lambda tensor: tensor.float()),
    "no saved tensor hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none here"),
    "cached parametrizations": lambda: nn.utils.parametrize.cached(), "a function mode": lambda: BaseTorchFunctionMode(), "a dispatch mode": lambda: Passing(),
}  # fmt: skip


class Creating(Mixed):
    """Makes tensors of the default precision and device in its forward."""

    def forward(self, x):
        return super().forward(x) + torch.ones(2) / 3


def value(objective):
    return [objective.value(), objective.gradient().tolist()]


def product(make):
    def act(objective):
        op = make(objective)
        return [(op @ objective.space.sample(0, 0, "normal")).tolist(), op.about["preflight"], op.about["engine"]]

    return act


def spectrum(objective):
    found = og.spectrum(og.hessian(objective), k=2, max_products=25, rel_error=0.5)
    return [found.top.values.tolist(), found.trace.value, found.density.nodes.tolist()]


ACTS = {"value": value, "hessian": product(og.hessian), "ggn": product(og.ggn), "fisher": product(og.fisher), "spectrum": spectrum, "align": lambda objective: og.align(objective, objective, objective.at(objective.theta * 0.9)).similarity}
CASES = list(itertools.product(CONTEXTS, ACTS, ("made outside", "made inside")))
_PLAIN = {}


def plain(act, made):
    """What an act gives outside any context; models that make tensors by default are only asked of objectives made outside."""
    if (act, made) not in _PLAIN:
        model = (Creating if made == "made outside" else Mixed)()
        _PLAIN[act, made] = model, ACTS[act](Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=3))
    return _PLAIN[act, made]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(("context", "act", "made"), rotating(CASES, 12))
def test_a_callers_context_changes_no_number(context, act, made):
    model, expected = plain(act, made)
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=3)
    with CONTEXTS[context]():
        before = process_state(model)
        found = ACTS[act](objective if made == "made outside" else Objective(model, nn.CrossEntropyLoss(), (X, Y), batch_size=3))
        assert process_state(model) == before
    assert found == expected
