"""Verdicts of `stability` against running the optimiser itself, and its figures against each other."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import orograph as og
from orograph.studies.problems import digits

from .families import rotating
from .test_optimizers import CASES, LATE, Weights, frozen_state, growth, matrix, quadratic


def batchnorm_mlp():
    first = [nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU()]
    return nn.Sequential(*first, nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10))


def batchnorm_cnn():
    image = nn.Unflatten(1, (1, 8, 8))
    convolution = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(image, *convolution, nn.Flatten(), nn.Linear(54, 10))


def layernorm_mlp():
    return nn.Sequential(nn.Linear(64, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 10))


def tanh_mlp():
    return nn.Sequential(nn.Linear(64, 20), nn.Tanh(), nn.Linear(20, 10))


def dead_units():
    net = nn.Sequential(nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 10))
    with torch.no_grad():
        net[0].bias[:5] = -50.0
    return net


class Attention(nn.Module):
    """A bias of the keys changes no softmax."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 10)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, x):
        tokens = self.embedding(x.view(-1, 8, 8))
        attended = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        return self.head(self.norm(tokens + attended).mean(1))


NETWORKS = {
    "BatchNorm MLP": batchnorm_mlp,
    "BatchNorm CNN": batchnorm_cnn,
    "LayerNorm MLP": layernorm_mlp,
    "tanh MLP": tanh_mlp,
    "dead units": dead_units,
    "attention": Attention,
}
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, 1e-3),
    "AdamW": lambda p: torch.optim.AdamW(p, 3e-3),
    "NAdam": lambda p: torch.optim.NAdam(p, 2e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "SGD": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.02, momentum=0.9),
}
SCHEDULES = {"2 steps": (2, 0), "20 steps": (20, 0), "200 steps": (200, 0), "mini-batches": (200, 32)}
TRAINED = [(n, o, s) for n in NETWORKS for o in OPTIMIZERS for s in SCHEDULES]
ON, AT_MOST = 30, 1.2  # steps that decide whether a training is healthy, and the rise that it may have


def train(net, optimizer, steps, batch):
    x, y = (part[:200] for part in digits().train)
    order = torch.Generator().manual_seed(0)
    losses = []
    net.train()
    for _ in range(steps):
        rows = torch.randperm(len(x), generator=order)[:batch] if batch else slice(None)
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def trained(network, optimizer, schedule):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = NETWORKS[network]()
    chosen = OPTIMIZERS[optimizer](net.parameters())
    train(net, chosen, *SCHEDULES[schedule])
    return net, chosen


def run_on(net, optimizer):
    """Highest loss over the first one of a copy that trains on with the full batch."""
    again = copy.deepcopy(net)
    copied = type(optimizer)(again.parameters(), lr=1.0)
    copied.load_state_dict(optimizer.state_dict())
    losses = train(again, copied, ON, 0)
    return max(losses) / losses[0] if all(map(math.isfinite, losses)) else math.inf


def measured(net, optimizer, mode="eval"):
    x, y = (part[:200] for part in digits().train)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", og.OrographWarning)  # BatchNorm is not as in training
        objective = og.Objective(net.eval(), nn.CrossEntropyLoss(), (x, y), mode=mode)
        return og.measure(objective, "stability", optimizer=optimizer)


def healthy_trainings_are_not_beyond(network, optimizer, schedule):
    """Returns whether the training is healthy: of any other there is nothing to be tested."""
    net, chosen = trained(network, optimizer, schedule)
    if run_on(net, chosen) >= AT_MOST:
        return False
    for mode in ("eval", "batch"):
        record = measured(net, chosen, mode)
        assert all(row["verdict"] != "beyond the edge" for row in record["edge"].rows), record.says
        assert "beyond the edge" not in record.says
    return True


@pytest.mark.parametrize("case", rotating(TRAINED, 6), ids=str)
def test_a_healthy_training_is_never_said_to_be_beyond_the_edge(case):
    healthy_trainings_are_not_beyond(*case)


RAISED = [(n, o) for n in NETWORKS for o in OPTIMIZERS if o not in ("Adam", "AdamW")]


def a_raised_rate_is_told(network, optimizer):
    """Returns whether the run broke: only then is there a verdict to be had."""
    net, chosen = trained(network, optimizer, "200 steps")
    for group in chosen.param_groups:
        group["lr"] *= 300
    broke = run_on(net, chosen) > 10
    edges = measured(net, chosen, "batch")["edge"].rows
    assert not broke or edges[-1]["verdict"] != "below the edge", edges
    return broke


@pytest.mark.parametrize("case", rotating(RAISED, 3), ids=str)
def test_a_rate_at_which_the_loss_blows_up_is_not_below_the_edge(case):
    a_raised_rate_is_told(*case)


WITHOUT_GRADIENT = {"BatchNorm MLP": {"0.bias", "3.bias"}, "BatchNorm CNN": {"1.bias"}}


@pytest.mark.parametrize("network", WITHOUT_GRADIENT)
@pytest.mark.parametrize("optimizer", ["Adam", "AdamW", "NAdam", "RMSprop", "Adagrad"])
def test_biases_in_front_of_batchnorm_are_named_and_left_out(network, optimizer):
    net, chosen = trained(network, optimizer, "20 steps")
    record = measured(net, chosen)
    whole, rest = record["edge"].rows
    assert set(rest["parameters"].removeprefix("without ").split(", ")) == WITHOUT_GRADIENT[network]
    assert whole["verdict"] == rest["verdict"] == "withheld" and "BatchNorm as in training" in record.missing
    assert whole["ratio"] > 100 > 2 > rest["ratio"] == record["edge_ratio"].value
    assert "No verdict" in record.says and rest["parameters"] in record.says


FIGURES = [name for name in CASES if "falling" not in name]


def figures_agree(name, step=LATE):
    """At the largest stable rate of the record the optimiser turns: 1 % below it contracts, 1 % above it diverges."""
    model, make = Weights(), CASES[name]
    objective = og.Objective.from_batch_loss(model, quadratic, [matrix()])
    optimizer = make(model)
    if not isinstance(optimizer, torch.optim.SGD):
        frozen_state(optimizer, step)
    record = og.measure(objective, "stability", optimizer=optimizer)
    ratio, rates = record["edge_ratio"].value, {row["measure"]: row for row in record["rates"].rows}
    largest = rates["largest stable learning rate"]["value"]
    rate = max(float(group["lr"]) for group in optimizer.param_groups)
    assert largest * ratio == pytest.approx(rate, rel=1e-12)
    assert f"{largest:.3g}" in record.says and f"{ratio:.2g} times" in record.says
    for row in record["edge"].rows:
        assert row["largest_stable_rate"] == largest and (row["verdict"] == "below the edge") == (row["ratio"] <= 0.8)

    def raised(times):
        def build(net):
            optimizer = make(net)
            for group in optimizer.param_groups:
                group["lr"] = times / ratio * group["lr"]
            return optimizer

        return build

    assert growth(raised(0.99), matrix(), step) < 0.75
    assert growth(raised(1.01), matrix(), step) > 1.3


@pytest.mark.parametrize("name", rotating(FIGURES, 8))
def test_ratio_largest_rate_and_sentence_are_one_statement_about_the_optimiser(name):
    figures_agree(name)
