"""Permutations found by watching a network run are proven, and a permuted copy is brought back exactly."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

import orograph as og
from orograph.alignment import align
from orograph.axes import Axis, cut, freeze, join, leaves_of, moved, product, regrouped, unify
from orograph.symmetries import find_symmetry, prove

from .families import rotating
from .symmetric_networks import MAKERS, images, symmetric_objective

KINDS = rotating(list(MAKERS), 4)
UNITS = {  # kind -> sizes of what may be permuted
    "MLP": [20, 16],
    "VGG": [6, 8, 10, 12],
    "CNN, BatchNorm": [8, 12],
    "ResNet, BatchNorm": [8, 8, 16, 16],
    "depthwise CNN": [8, 3, 4, 4],
    "depthwise CNN, BatchNorm": [8, 16, 16],
    "encoder layer": [2, 4, 16],
}


def planted(objective, seed=5):
    """The same function with units in a random order, and that order."""
    symmetry = find_symmetry(objective)
    g = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(axis.size, generator=g) for name, axis in symmetry.units.items()}
    return symmetry.permuted(objective.point(), orders, objective), orders


def with_noise(objective, point, share, seed):
    """Every tensor with normal noise, as a share of the standard deviation of its entries."""
    g = torch.Generator().manual_seed(seed)
    parts = objective.layout.split(point.theta)
    noisy = [t + share * t.std(unbiased=False) * torch.randn(t.shape, generator=g) for t in parts]
    return replace(point, theta=objective.layout.flatten(noisy, point.theta))


def brought_back(name, seed, method, noise=0.0):
    """Units of a permuted copy, possibly with noise, that do not come back to their places."""
    objective = symmetric_objective(name, seed)
    other, orders = planted(objective, seed)
    if noise:
        other = with_noise(objective, other, noise, seed)
    found = align(objective, objective.point(), other, method=method)
    assert found.verified
    wrong = [n for n, order in found.permutations.items() if orders[n][order].tolist() != list(range(len(order)))]
    if not noise:
        point = objective.point()
        same = torch.equal(found.point.theta, point.theta)
        same = same and all(torch.equal(tensor, point.buffers[n]) for n, tensor in found.point.buffers.items())
        assert same or wrong
        return [] if same else wrong
    return wrong


PLANTED = [(name, seed, method) for name in MAKERS for seed in range(6) for method in ("weights", "activations")]


@pytest.mark.parametrize(("name", "seed", "method"), rotating(PLANTED, 6))
def test_permuted_copies_are_brought_back_to_the_bit(name, seed, method):
    assert brought_back(name, seed, method) == []


@pytest.mark.parametrize(("name", "seed"), rotating([(name, seed) for name in MAKERS for seed in range(6)], 3))
def test_permuted_copies_with_five_percent_noise_are_brought_back_by_weights(name, seed):
    assert brought_back(name, seed, "weights", noise=0.05) == []


@pytest.mark.parametrize("name", KINDS)
def test_all_units_are_found_and_proven(name):
    objective = symmetric_objective(name)
    symmetry = find_symmetry(objective)
    assert prove(objective, symmetry) is symmetry and not symmetry.is_proof_of_watched
    sizes = [axis.size for axis in symmetry.units.values()]
    assert sorted(sizes) == sorted(UNITS[name]) if name in UNITS else sizes
    assert not any("no reason" in reason for reason in symmetry.left().values())


@pytest.mark.parametrize("name", KINDS)
def test_aligning_leaves_the_function_alone(name):
    objective = symmetric_objective(name)
    noise = torch.randn(objective.size, generator=torch.Generator().manual_seed(2))
    noisy = objective.at(objective.theta + 0.05 * noise)
    other, _ = planted(noisy)
    found = align(objective, objective.point(), other)
    assert objective.at(found.point).value() == pytest.approx(objective.at(other).value(), rel=1e-4)
    assert found.similarity[1] >= found.similarity[0]


class Numbered(nn.Module):
    """A number that depends on the order of the units is made outside of PyTorch, where nothing shows it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 10)

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        return self.last(hidden * float((hidden.detach().numpy() * range(1, 7)).sum()))


def test_a_network_whose_symmetry_cannot_be_proven_is_refused_by_name():
    objective = og.Objective(Numbered(), nn.CrossEntropyLoss(), images())
    with pytest.raises(og.OrographError, match="permutations found for first"):
        align(objective, objective.point(), objective.point())


def test_units_that_the_network_itself_tells_apart_stay():
    class Weighted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(64, 6), nn.Linear(6, 10)
            self.register_buffer("scale", torch.arange(1.0, 7.0))

        def forward(self, x):
            return self.last(self.first(x) * self.scale)

    assert not find_symmetry(og.Objective(Weighted(), nn.CrossEntropyLoss(), images())).units


def test_what_cannot_be_permuted_has_no_similarity_and_connect_says_so():
    nets = [nn.Linear(64, 10) for _ in range(2)]
    objective = og.Objective(nets[0], nn.CrossEntropyLoss(), images())
    found = align(objective, *nets)
    assert found.similarity is None and not found.permutations
    assert found.left == {"weight[0]": "an axis of the outputs", "weight[1]": "an axis of the data", "bias[0]": "an axis of the outputs"}
    record = og.connect(objective, *nets, curve_epochs=0)
    assert "aligned by weights" not in [row["stage"] for row in record["stages"].rows]
    assert "nothing could be permuted: the network has no units" in record.missing["aligned by weights"]
    assert "Nothing could be permuted" in record.says


def test_connect_says_what_stays_in_place():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(64, 6), nn.Linear(6, 5), nn.Linear(5, 10)

        def forward(self, x):
            return self.last(torch.relu(self.middle(self.first(x)).cumsum(1)))

    nets = [Net() for _ in range(2)]
    record = og.connect(og.Objective(nets[0], nn.CrossEntropyLoss(), images()), *nets, curve_epochs=0)
    kept = {row["units"]: row["reason"] for row in record["units"].rows if not row["permuted"]}
    assert set(kept) == {"middle.weight[0]", "middle.bias[0]", "last.weight[1]"} and "order of entries" in kept["last.weight[1]"]
    assert "3 of 4 kinds of units stay in place" in record.says


def test_align_refuses_what_it_cannot_see_through():
    mlp = symmetric_objective("MLP")
    net = nn.Linear(1, 1)
    hidden = og.Objective.from_batch_loss(net, lambda model, batch: (model(batch).sum(), len(batch)), [torch.ones(3, 1)])
    with pytest.raises(TypeError, match="hides"):
        align(hidden, hidden.point(), hidden.point())
    with pytest.raises(ValueError, match='needs "weights" or "activations"'):
        align(mlp, mlp.point(), mlp.point(), method="names")


class TestAxes:
    def test_a_product_is_split_where_another_one_needs_it(self):
        a, b = product([Axis(2), Axis(12)]), product([Axis(6), Axis(4)])
        unify(a, b)
        assert [leaf.size for leaf in leaves_of(a)] == [2, 3, 4] == [leaf.size for leaf in leaves_of(b)]

    def test_a_join_is_split_where_another_one_needs_it(self):
        a, b = join([Axis(2), Axis(5)]), join([Axis(4), Axis(3)])
        unify(a, b)
        assert [leaf.size for leaf in leaves_of(a)] == [2, 2, 3]

    def test_what_cannot_agree_is_frozen(self):
        a, b = product([Axis(2), Axis(3)]), join([Axis(2), Axis(4)])
        unify(a, b)
        assert all(leaf.frozen for leaf in [*leaves_of(a), *leaves_of(b)])

    def test_frozen_entries_freeze_what_they_are_unified_with(self):
        a, b = Axis(6), product([Axis(2), Axis(3)])
        freeze(a)
        unify(a, b)
        assert all(leaf.frozen for leaf in leaves_of(b)) and a.root is b.root
        with pytest.raises(ValueError, match="cannot move together"):
            unify(Axis(2), Axis(3))

    def test_reshapes_split_and_merge(self):
        whole = Axis(24)
        two = regrouped([Axis(5), whole], [5, 4, 6])
        assert [axis.size for axis in two] == [5, 4, 6] and [leaf.size for leaf in leaves_of(whole)] == [4, 6]
        assert regrouped(two, [20, 6])[0].size == 20
        assert regrouped([Axis(6)], [4, 2]) is None

    def test_slices_make_joins(self):
        whole = Axis(10)
        assert cut(whole, 0, 4).size == 4 and cut(whole, 4, 10).size == 6 and [s.size for s in leaves_of(whole)] == [4, 6]
        assert cut(product([Axis(2), Axis(5)]), 0, 5) is None

    def test_parts_that_add_nothing_are_left_out_so_that_no_axis_contains_itself(self):
        a, one = Axis(8), product([Axis(8), Axis(1)])
        unify(a, one)
        unify(a.root, product([Axis(1), one]))
        assert one.kind == "leaf" and join([Axis(0), one, Axis(0)]) is one.root and leaves_of(a) == [one.root]

    def test_thousands_of_axes_and_cuts_do_not_exhaust_the_stack(self):
        axes = [Axis(3000) for _ in range(5000)]
        for x, y in pairwise(axes):
            unify(x, y)
        for i in range(3000):
            assert cut(axes[0], i, i + 1).size == 1
        assert len(leaves_of(axes[-1])) == 3000

    def test_orders_of_products_and_joins(self):
        a, b, c = Axis(2), Axis(3), Axis(2)
        orders = {a: torch.tensor([1, 0]), b: torch.tensor([2, 0, 1]), c: torch.tensor([1, 0])}
        assert moved(product([a, b]), orders).tolist() == [5, 3, 4, 2, 0, 1]
        assert moved(join([b, c]), orders).tolist() == [2, 0, 1, 4, 3]
