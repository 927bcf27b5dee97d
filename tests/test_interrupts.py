"""Ctrl-C at any moment leaves the user's tensors, modes, flags and random states as they were, and the next measurement is right."""

import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orograph as og
from orograph import Objective

from .families import rotating
from .interrupting import PACKAGE, RESTORING, Interrupter, moments_of, process_state
from .test_unharmed import MEASUREMENTS, measurement

X = torch.randn(6, 3, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randint(0, 2, (6,), generator=torch.Generator().manual_seed(1))


class Mixed(nn.Module):
    """A recurrent layer, attention, running statistics, a parametrised weight, and a list that the forward appends to."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.rnn, self.attention = nn.LSTM(4, 4, batch_first=True), nn.MultiheadAttention(4, 2, batch_first=True)
            self.norm, self.last = nn.BatchNorm1d(4), nn.utils.parametrizations.spectral_norm(nn.Linear(4, 2))
        self.seen, self.calls = [], 0

    def forward(self, x):
        self.calls += 1
        self.seen.append(x)
        x = self.rnn(x)[0]
        x = self.attention(x, x, x)[0].mean(1)
        return self.last(self.norm(x))


def copied():
    model = Mixed().train()
    return model, nn.CrossEntropyLoss()


def in_place():
    """A loss that reaches the model from outside, so that there can be no private copy."""
    model = Mixed().train()
    return model, lambda out, y: F.cross_entropy(out, y) + 0.01 * sum((p**2).sum() for p in model.parameters())


WAYS = {"copied": copied, "in place": in_place}
USES = {
    "construction": lambda model, criterion, objective: Objective(model, criterion, (X, Y)),
    "value": lambda model, criterion, objective: objective.value(),
    "gradient at another point": lambda model, criterion, objective: objective.at(objective.theta * 0.9).gradient(),
    "several at once": lambda model, criterion, objective: og.crowds.losses_of(objective, [objective.point(), objective.point(objective.theta * 0.5)]),
    "re-estimated statistics": lambda model, criterion, objective: og.renormalise.renormalised(objective),
}
_CASES = {}


def case(way, use):
    """A model with an objective of it, and every moment of a use of them; made once."""
    if (way, use) not in _CASES:
        model, criterion = WAYS[way]()
        F.cross_entropy(model(X), Y).backward()
        objective = Objective(model, criterion, (X, Y))
        assert objective.isolation.startswith("a private copy" if way == "copied" else "the model itself")
        act = lambda: USES[use](model, criterion, objective)
        act()
        _CASES[way, use] = model, objective, objective.value(), act, moments_of(act)
    return _CASES[way, use]


def leaves_nothing_behind(model, objective, value, act, interrupter):
    before = process_state(model)
    try:
        interrupter(act)
    except KeyboardInterrupt:
        assert process_state(model) == before, interrupter.struck  # while the exception still holds its frames
    assert process_state(model) == before, interrupter.struck
    assert objective.value() == value


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_at_any_line_that_sets_or_restores_leaves_nothing_behind(way, use):
    model, objective, value, act, moments = case(way, use)
    for moment in rotating(moments, 12):
        leaves_nothing_behind(model, objective, value, act, Interrupter(RESTORING, moment))


def random_moments(name, way, count):
    """Interrupt one measurement at `count` random moments of all that it passes in this package; those after which something was left behind."""
    model, objective, value, _, _ = case(way, "value")
    act, files = (lambda: measurement(name)(objective)), (str(PACKAGE),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counter = Interrupter(files)
        counter(act)
        moments = torch.randint(1, counter.count + 1, (count,), generator=torch.Generator().manual_seed(0)).tolist()
        before, forking = process_state(model), Interrupter(files, forks=frozenset(moments))
        try:
            try:
                forking(act)
            except KeyboardInterrupt:
                if not forking.is_child:
                    raise
            # a child whose interrupt fell into a finaliser, where Python drops it, comes here too
            if forking.is_child and process_state(model) == before and objective.value() == value:
                os._exit(0)
        finally:
            if forking.is_child:
                os._exit(1)
    return forking.failed, len(set(moments))


@pytest.mark.parametrize("name", rotating(MEASUREMENTS, 2))
@pytest.mark.parametrize("way", WAYS)
def test_an_interrupt_at_a_random_moment_of_a_measurement_leaves_nothing_behind(way, name):
    failed, count = random_moments(name, way, 25)
    assert failed == [] and count > 15
