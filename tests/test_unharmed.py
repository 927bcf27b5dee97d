"""A measured network and an unmeasured copy of it train on and stay equal to the last bit, whatever was measured and however often."""

import itertools
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orograph as og
from orograph import Objective
from orograph.registry import find_probe

from .every_module import KINDS, LOSSES, NO_NETWORK, NOT_ALONE, StatefulLoss, inputs, network, targets
from .families import rotating

CLASSES = {name for name, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)}
SMALL = {
    "surface": {"resolution": 3}, "trajectory": {"resolution": 3}, "barrier": {"resolution": 3, "refine": False}, "basins": {"resolution": 3}, "pac_bayes": {"draws": 5, "sigmas": [0.1]},
    "spectrum": {"k": 1, "rel_error": 0.5, "max_products": 20}, "conditioning": {"steps": 2, "tol": 0.5}, "connectivity": {"resolution": 3, "curve_epochs": 1},
    "layers": {"max_products": 3, "tol": 0.5}, "noise": {"sigmas": [0.1], "pairs": 2}, "sharpness": {"gradients": 2, "pairs": 2, "iterations": 2, "steps": 1},
}  # fmt: skip


def test_no_module_class_of_torch_is_forgotten():
    covered = {name.partition(",")[0] for name in KINDS} | set(NO_NETWORK) | set(NOT_ALONE) | set(LOSSES)
    assert covered >= CLASSES


def everything_of(model):
    """All that a module holds, as values that can be compared: tensors, gradients, modes, attributes, hooks, and what its output is."""
    found = {"state": {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in model.state_dict().items()}}
    for name, module in model.named_modules():
        found[name, "dict"] = list(module.__dict__)
        found[name, "plain"] = {key: value for key, value in module.__dict__.items() if isinstance(value, (bool, int, float, str))}
        found[name, "sizes"] = {key: len(value) for key, value in module.__dict__.items() if isinstance(value, (dict, list))}
    for name, parameter in model.named_parameters():
        found[name, "grad"] = None if parameter.grad is None else parameter.grad.tolist()
        found[name, "requires"] = parameter.requires_grad
    return found


def step(model, x, y, seed):
    """One step of training, with the same random numbers for a network and its twin."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9).step()
        return loss.item()


def measurement(name):
    """What is done with an objective: "value", "gradient", "hessian", "align", "connect", or a probe."""
    if name in ("value", "gradient"):
        return lambda objective: getattr(objective, name)()
    if name == "hessian":
        return lambda objective: og.hessian(objective) @ objective.space.sample(0, 0, "normal")
    others = lambda objective, count: [objective.at(objective.theta + 0.05 * i * objective.space.sample(0, i, "normal")).point(label=f"network {i}") for i in range(count)]
    if name == "align":
        return lambda objective: og.align(objective, *others(objective, 2))
    if name == "connect":
        return lambda objective: og.connect(objective, *others(objective, 2), **SMALL["connectivity"])
    points = find_probe(name).points
    count = 3 if points and points[0].startswith("*") else len(points)
    return lambda objective: og.measure(objective, name, *others(objective, count), **SMALL.get(name, {}))


MEASUREMENTS = ["value", "gradient", "hessian", "align", "connect", *og.list_probes()]
REFUSALS = (og.OrographError, ValueError, TypeError, NotImplementedError, RuntimeError)


def twin_stays_equal(kind, name, times):
    """Train, measure `times` times, train on; the twin is never measured. What a measurement raises is no matter here."""
    x, y = inputs(KINDS[kind]), targets()
    model = network(kind)
    step(model, x, y, 0)
    twin = network(kind)
    step(twin, x, y, 0)
    criterion, act = nn.CrossEntropyLoss(), measurement(name)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(times):
            try:
                act(Objective(model, criterion, (x, y)))
            except REFUSALS as error:
                if "Orograph" not in str(error) and KINDS[kind].refused not in str(error):
                    raise
    losses = [[step(net, x, y, seed) for seed in (1, 2)] for net in (model, twin)]
    assert losses[0] == losses[1]
    assert everything_of(model) == everything_of(twin)
    assert torch.equal(model.eval()(x), twin.eval()(x))


@pytest.mark.parametrize(("kind", "name", "times"), rotating(list(itertools.product(KINDS, MEASUREMENTS, (1, 2, 3))), 40))
def test_a_measured_network_trains_on_like_its_twin(kind, name, times):
    twin_stays_equal(kind, name, times)


@pytest.mark.parametrize("kind", ["LSTM", "GRU, both ways", "RNN, two layers", "LSTM, projected", "BatchNorm1d", "Embedding, max_norm", "old weight norm", "orthogonal"])
@pytest.mark.parametrize("times", [1, 2, 3])
def test_classes_that_keep_their_weights_twice_or_write_to_them_train_on(kind, times):
    twin_stays_equal(kind, "value", times)


@pytest.mark.parametrize("name", rotating(list(LOSSES), 4))
def test_a_loss_with_a_memory_is_left_alone(name):
    criterion, model = StatefulLoss(name), network("Linear")
    objective = Objective(model, criterion, (inputs(KINDS["Linear"]), targets()))
    objective.value()
    assert criterion.calls == 0 and criterion.history == [] and criterion.seen == 0
