"""Units of every kind of layer are found, and no rule moves an axis wrongly."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import orograph as og
from orograph.alignment import align
from orograph.symmetries import find_symmetry, prove

from . import operator_walk
from .families import rotating


class Between(nn.Module):
    """A layer between two linear ones."""

    def __init__(self, layer, before=8, after=8, shape=()):
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(6, before), layer, nn.LazyLinear(3)
        self.shape = shape

    def forward(self, x):
        h = torch.tanh(self.first(x))
        h = h.unflatten(-1, self.shape) if self.shape else h
        h = self.layer(h)
        return self.last(h.flatten(1) if self.shape else h)


class Recurrent(nn.Module):
    """A recurrent layer over three steps of ten sequences."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.view(3, 10, 8))[0].flatten(0, 1)


class Cell(nn.Module):
    """A recurrent cell that makes three steps over the same inputs."""

    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x):
        state = None
        for _ in range(3):
            state = self.cell(x, state)
        return state[0] if isinstance(state, tuple) else state


class Product(nn.Module):
    """A bilinear layer of two projections."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.both = nn.Linear(8, 5), nn.Linear(8, 7), nn.Bilinear(5, 7, 4)

    def forward(self, x):
        return self.both(self.left(x), self.right(x))


LAYERS = {  # name -> (layer, shape of what it is given, sizes of the units)
    "LSTM": (lambda: Recurrent(nn.LSTM(8, 7)), (), [7, 8]),
    "LSTM, two layers, both ways": (lambda: Recurrent(nn.LSTM(8, 7, num_layers=2, bidirectional=True)), (), [7, 7, 7, 7, 8]),
    "LSTM with projections": (lambda: Recurrent(nn.LSTM(8, 7, proj_size=5)), (), [5, 7, 8]),
    "GRU": (lambda: Recurrent(nn.GRU(8, 7, bidirectional=True)), (), [7, 7, 8]),
    "RNN": (lambda: Recurrent(nn.RNN(8, 7, num_layers=2, nonlinearity="relu")), (), [7, 7, 8]),
    "LSTM cell": (lambda: Cell(nn.LSTMCell(8, 7)), (), [7, 8]),
    "GRU cell": (lambda: Cell(nn.GRUCell(8, 7)), (), [7, 8]),
    "RNN cell": (lambda: Cell(nn.RNNCell(8, 7)), (), [7, 8]),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(8, 7)), (), [7, 8]),
    "weight norm, all at once": (lambda: parametrizations.weight_norm(nn.Linear(8, 7), dim=None), (), [7, 8]),
    "weight norm, old": (lambda: weight_norm(nn.Linear(8, 7)), (), [7, 8]),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(8, 7)), (), [7, 8]),
    "spectral norm, old": (lambda: spectral_norm(nn.Linear(8, 7)), (), [7, 8]),
    "spectral norm of a convolution": (lambda: parametrizations.spectral_norm(nn.Conv1d(4, 7, 2)), (4, 2), [4, 7]),
    "GLU": (nn.GLU, (), [4]),
    "PReLU": (lambda: nn.PReLU(8), (), [8]),
    "bilinear": (Product, (), [4, 5, 7, 8]),
    "convolution, 3 dimensions": (lambda: nn.Sequential(nn.Conv3d(8, 7, 1), nn.BatchNorm3d(7)), (8, 1, 1, 1), [7, 8]),
    "transposed convolution": (lambda: nn.ConvTranspose1d(8, 7, 2), (8, 1), [7, 8]),
    "instance norm": (lambda: nn.Sequential(nn.Conv1d(8, 7, 2, padding=2), nn.InstanceNorm1d(7, affine=True, track_running_stats=True)), (8, 1), [7, 8]),
    "RMS norm": (lambda: nn.RMSNorm(8), (), [8]),
    "layer norm": (lambda: nn.LayerNorm(8), (), [8]),
    "local response norm": (lambda: nn.Sequential(nn.Conv1d(8, 7, 1), nn.LocalResponseNorm(2)), (8, 1), [8]),
}  # fmt: skip


def network(name, seed):
    """Two networks with that layer, and an objective."""
    make, shape, _ = LAYERS[name]
    nets = []
    x, y = torch.randn(30, 6, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    for number in (0, 1):
        torch.manual_seed(2 * seed + number)
        net = Between(make(), shape=shape)
        with torch.no_grad():
            for _ in range(3):
                net(x)
            for parameter in net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        nets.append(net.eval())
    return og.Objective(nets[0], nn.CrossEntropyLoss(), (x, y)), nets


def brings_units_back(name, seed):
    """Whether all units are found, and permuted copies come back by both methods."""
    objective, nets = network(name, seed)
    symmetry = find_symmetry(objective)
    assert prove(objective, symmetry) is symmetry
    assert sorted(axis.size for axis in symmetry.units.values()) == LAYERS[name][2], symmetry.left(inherent=False)
    g = torch.Generator().manual_seed(seed)
    orders = {key: torch.randperm(axis.size, generator=g) for key, axis in symmetry.units.items()}
    point = objective.point()
    other = symmetry.permuted(point, orders, objective)
    for method in ("weights", "activations"):
        found = align(objective, point, other, method=method)
        assert torch.equal(found.point.theta, point.theta), (method, found.permutations)
        assert all(torch.equal(tensor, point.buffers[key]) for key, tensor in found.point.buffers.items())
    found = align(objective, *nets)
    assert objective.at(found.point).value() == pytest.approx(objective.at(nets[1]).value(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:LSTM with projections", "ignore:.*weight_norm. is deprecated")
@pytest.mark.parametrize(("name", "seed"), rotating([(name, seed) for name in LAYERS for seed in range(3)], 8))
def test_units_of_every_layer_are_found_and_come_back(name, seed):
    brings_units_back(name, seed)


@pytest.mark.slow
def test_no_rule_moves_an_axis_wrongly_in_pytorchs_own_samples():
    found = [operator_walk.check(op, *sample) for op in operator_walk.operations() for sample in operator_walk.samples(op)]
    assert found.count("moves") > 1000
