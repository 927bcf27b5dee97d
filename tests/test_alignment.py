"""Permutations found by watching a network run are proven, and a permuted copy is brought back exactly."""

import pytest
import torch
from torch import nn

import orograph as og
from orograph.alignment import align
from orograph.axes import Axis, cut, freeze, join, leaves_of, moved, product, regrouped, unify
from orograph.symmetries import find_symmetry, prove

from .symmetric_networks import images, symmetric_objectives

OBJECTIVES = symmetric_objectives()
UNITS = {  # kind -> sizes of what may be permuted
    "MLP": [20, 16], "VGG": [6, 8, 10, 12], "CNN, BatchNorm": [8, 12], "ResNet, BatchNorm": [8, 8, 16, 16], "depthwise CNN": [8, 3, 4, 4], "encoder layer": [2, 4, 16],
}  # fmt: skip


def planted(objective, seed=5):
    """The same function with units in a random order, and that order."""
    symmetry = find_symmetry(objective)
    g = torch.Generator().manual_seed(seed)
    orders = {name: torch.randperm(axis.size, generator=g) for name, axis in symmetry.units.items()}
    return symmetry.permuted(objective.point(), orders, objective), orders


@pytest.mark.parametrize("name", OBJECTIVES)
class TestEveryKind:
    def test_all_units_are_found_and_proven(self, name):
        symmetry = find_symmetry(OBJECTIVES[name])
        prove(OBJECTIVES[name], symmetry)
        sizes = [axis.size for axis in symmetry.units.values()]
        assert not symmetry.unknown
        if name in UNITS:
            assert sorted(sizes) == sorted(UNITS[name])
        else:
            assert len(sizes) >= 8

    def test_weights_bring_a_permuted_copy_back_exactly(self, name):
        objective = OBJECTIVES[name]
        other, orders = planted(objective)
        found = align(objective, objective.point(), other)
        assert torch.equal(found.point.theta, objective.theta) and found.verified and found.similarity[1] == pytest.approx(1.0)
        assert all(torch.equal(buffer, objective.point().buffers[key]) for key, buffer in found.point.buffers.items())
        assert all(torch.equal(orders[key][order], torch.arange(len(order))) for key, order in found.permutations.items())

    def test_activations_bring_a_permuted_copy_back(self, name):
        objective = OBJECTIVES[name]
        other, _ = planted(objective)
        found = align(objective, objective.point(), other, method="activations")
        if name == "ViT":  # its last layer is seen at one position only: a part of its heads has nothing to be told apart by
            assert found.similarity[1] > found.similarity[0]
        else:
            assert torch.equal(found.point.theta, objective.theta)

    def test_aligning_leaves_the_function_alone(self, name):
        objective = OBJECTIVES[name]
        noisy = objective.at(objective.theta + 0.05 * torch.randn(objective.size, generator=torch.Generator().manual_seed(2)))
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


def test_align_refuses_what_it_cannot_see_through():
    net = nn.Linear(1, 1)
    hidden = og.Objective.from_batch_loss(net, lambda model, batch: (model(batch).sum(), len(batch)), [torch.ones(3, 1)])
    with pytest.raises(TypeError, match="hides"):
        align(hidden, hidden.point(), hidden.point())
    with pytest.raises(ValueError, match='needs "weights" or "activations"'):
        align(OBJECTIVES["MLP"], OBJECTIVES["MLP"].point(), OBJECTIVES["MLP"].point(), method="names")


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

    def test_orders_of_products_and_joins(self):
        a, b, c = Axis(2), Axis(3), Axis(2)
        orders = {a: torch.tensor([1, 0]), b: torch.tensor([2, 0, 1]), c: torch.tensor([1, 0])}
        assert moved(product([a, b]), orders).tolist() == [5, 3, 4, 2, 0, 1]
        assert moved(join([b, c]), orders).tolist() == [2, 0, 1, 4, 3]
