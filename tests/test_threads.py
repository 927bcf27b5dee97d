"""Threads that measure at the same time, and beside the user's own forward, get the numbers that they get alone."""

import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orograph as og
from orograph import Objective

from .families import rotating
from .interrupting import process_state
from .test_interrupts import WAYS, Mixed, X, Y

ACTS = {
    "construct and evaluate": lambda model, criterion, objective, i: Objective(model, criterion, (X, Y)).value(),
    "value elsewhere": lambda model, criterion, objective, i: objective.at(objective.theta * (1 + 0.1 * i)).value(),
    "product": lambda model, criterion, objective, i: (og.hessian(objective.at(objective.theta * (1 + 0.1 * i))) @ objective.space.sample(i, 0, "normal")).tolist(),
    "spectrum": lambda model, criterion, objective, i: og.measure(objective.at(objective.theta * (1 + 0.1 * i)), "spectrum", k=1, max_products=20, rel_error=0.5)["spectrum"].top.values.tolist(),
}


def together(functions):
    """Run all at once and give what each has returned or raised."""
    found, start = [None] * len(functions), threading.Barrier(len(functions))

    def run(index):
        start.wait()
        try:
            found[index] = functions[index]()
        except Exception as error:
            found[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def right_in_threads(way, act, threads, models):
    pairs = [WAYS[way]() for _ in range(models)]
    objectives = [Objective(model, criterion, (X, Y)) for model, criterion in pairs]
    tasks = [(lambda i=i: [ACTS[act](*pairs[i % models], objectives[i % models], i) for _ in range(3)]) for i in range(threads)]
    alone = [task() for task in tasks]
    before = [process_state(model) for model, _ in pairs]
    for found, expected in zip(together(tasks), alone, strict=True):
        assert not isinstance(found, Exception), found
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=1e-3, atol=1e-5)  # rounding depends on where arrays lie; another point is 10 % off
    assert [process_state(model) for model, _ in pairs] == before


CASES = [(way, act, threads, models) for way in WAYS for act in ACTS for threads in (2, 4) for models in (1, 2)]


@pytest.mark.parametrize(("way", "act", "threads", "models"), rotating(CASES, 4))
def test_threads_that_measure_together_get_the_numbers_of_each_alone(way, act, threads, models):
    right_in_threads(way, act, threads, models)


def trained(model, steps, pause=0.0):
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimiser.zero_grad()
        F.cross_entropy(model(X), Y).backward()
        optimiser.step()
        time.sleep(pause)
    return [p.detach().clone() for p in model.parameters()]


def right_beside_training(act, steps=60):
    """The user trains in one thread while another measures an objective that was made before."""
    model, twin, criterion = Mixed().train(), Mixed().train(), nn.CrossEntropyLoss()
    objective = Objective(model, criterion, (X, Y))
    expected, done = ACTS[act](model, criterion, objective, 1), []

    def measure():
        while not done:
            assert torch.allclose(torch.tensor(ACTS[act](model, criterion, objective, 1)), torch.tensor(expected), rtol=1e-3, atol=1e-5)
        return True

    def train():
        try:
            return trained(model, steps, 0.001)
        finally:
            done.append(True)

    measured, ours = together([measure, train])
    assert measured is True
    theirs = trained(twin, steps)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("act", rotating(["value elsewhere", "product", "spectrum"], 1))
def test_training_beside_a_measurement_is_what_it_is_alone(act):
    right_beside_training(act, steps=20)
