"""Claims about `align`, each with its measured figure."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

from tests import operator_walk, test_alignment, test_branches, test_unit_rules
from tests.symmetric_networks import symmetric_objective
from torch import nn

from orograph import Line, Objective, connect
from orograph.alignment import align
from orograph.profiles import trace_path
from orograph.studies.networks import cnn, mlp
from orograph.studies.problems import digits
from orograph.studies.training import train_to_loss

from .tables import Row, holds

BEFORE = {  # barriers of the straight line after matching by (weights, activations), five pairs, before starts by sorted entries
    "MLP": ((0.029525, 0.034191, 0.063624, 0.076093, 0.034142), (0.056311, 0.060197, 0.100881, 0.059295, 0.040387)),
    "BatchNorm CNN": ((0.583019, 0.467257, 0.361965, 0.420683, 0.597898), (0.688367, 0.883423, 0.862483, 0.861060, 0.909861)),
}  # fmt: skip


def planted_rows() -> list[Row]:
    """Permuted copies of 18 architectures, by both methods, and with noise by weights."""
    wrong = [case for case in test_alignment.PLANTED if test_alignment.brought_back(*case)]
    total = len(test_alignment.PLANTED)
    noisy = sorted({(name, seed) for name, seed, _ in test_alignment.PLANTED})
    lost = [case for case in noisy if test_alignment.brought_back(*case, "weights", noise=0.05)]
    kinds = len({name for name, _ in noisy})
    return [
        (
            f"planted permutations, {kinds} architectures x 6 seeds x 2 methods: back to the bit",
            f"{total - len(wrong)} of {total}{_named(wrong)}",
            "all",
            not wrong,
        ),
        (
            "  with 5 % noise on the weights, by weights: all units back",
            f"{len(noisy) - len(lost)} of {len(noisy)}{_named(lost)}",
            "all",
            not lost,
        ),
    ]


def branch_rows() -> list[Row]:
    """Networks whose way depends on the data."""
    wrong = [case for case in test_branches.CASES if not test_branches.same_on_unseen_examples(*case)[0]]
    total = len(test_branches.CASES)
    kinds = len({kind for kind, _, _ in test_branches.CASES})
    claim = f"align on {kinds} models with data-dependent branches x 3 seeds x 2 methods: same function on unseen examples"
    return [(claim, f"{total - len(wrong)} of {total}{_named(wrong)}", "all", not wrong)]


def layer_rows() -> list[Row]:
    """Units of recurrent, normalised, gated and bilinear layers."""
    cases = [(name, seed) for name in test_unit_rules.LAYERS for seed in range(3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrong = [case for case in cases if not holds(partial(test_unit_rules.brings_units_back, *case))]
    claim = f"{len(test_unit_rules.LAYERS)} kinds of layers x 3 seeds: all units found, permuted copies back to the bit by both methods"
    return [(claim, f"{len(cases) - len(wrong)} of {len(cases)}{_named(wrong)}", "all", not wrong)]


def operator_rows() -> list[Row]:
    """PyTorch's own samples of all its operations."""
    found: Counter[str] = Counter()
    wrong: list[str] = []
    table = operator_walk.operations()
    for op in table:
        for flat, nesting in operator_walk.samples(op):
            try:
                found[operator_walk.check(op, flat, nesting)] += 1
            except AssertionError as error:
                wrong.append(str(error))
    text = f"{len(wrong)} wrong; units move in {found['moves']} samples, stay in place in {found['stays']}{_named(wrong)}"
    return [(f"axis rules against permuted inputs, {len(table)} operations of torch, {found.total()} samples", text, "none wrong", not wrong)]


def depthwise_rows() -> list[Row]:
    """Depthwise convolutions with BatchNorm, through `connect`."""
    objectives = [symmetric_objective("depthwise CNN, BatchNorm", seed) for seed in (0, 1)]
    record = connect(objectives[0], *(objective.point() for objective in objectives), curve_epochs=0)
    aligned = "aligned by weights" in str(record["stages"])
    return [("connect on depthwise convolutions with BatchNorm", "aligned" if aligned else "NOT aligned", "aligned", aligned)]


def trained_rows() -> list[Row]:
    """Barriers of trained pairs against those of the matching before."""
    problem, rows = digits(), list[Row]()
    makers: dict[str, Callable[[int], nn.Module]] = {
        "MLP": lambda seed: mlp(64, 32, 10, seed=seed, activation=nn.ReLU),
        "BatchNorm CNN": lambda seed: cnn(seed=seed, channels=(8, 16)),
    }
    for name, make in makers.items():
        found: dict[str, list[float]] = {"weights": [], "activations": []}
        for seed in range(5):
            nets = [make(2 * seed + number) for number in (0, 1)]
            for number, net in enumerate(nets):
                train_to_loss(net, problem.train, batch_size=32, learning_rate=0.1, target=0.03, seed=2 * seed + number)
            objective = Objective(nets[0].eval(), nn.CrossEntropyLoss(), problem.train, batch_size=256)
            a, b = (objective.point(net.eval()) for net in nets)
            for method, barriers in found.items():
                line = Line(a, align(objective, a, b, method=method, seed=seed).point)  # type: ignore[arg-type]
                profile = trace_path(objective, line, statistics="interpolated", resolution=11, report=lambda *_: None)
                barriers.append(profile.barriers("loss", "train")[0]["value"])
        for (method, barriers), before in zip(found.items(), BEFORE[name], strict=True):
            no_higher = sum(now <= old + 1e-4 for now, old in zip(barriers, before, strict=True))
            cells = " ".join(f"{now:.3f} ({old:.3f})" for now, old in zip(barriers, before, strict=True))
            rows.append((f"{name}, trained pairs by {method}: barrier (before)", f"no higher in {no_higher} of 5: {cells}", "5", no_higher == 5))
    return rows


def _named(wrong: list[str] | list[tuple[str, int]] | list[tuple[str, int, str]]) -> str:
    return "".join(f"; {case}" for case in wrong[:5])


SECTIONS: list[Callable[[], list[Row]]] = [planted_rows, branch_rows, layer_rows, operator_rows, depthwise_rows, trained_rows]
