"""Blocks of the Hessian against the dense matrix, and what the layers probe makes of them."""

import math

import pytest
import torch
from torch import nn

import orograph as og
from orograph.linalg.blocks import block_sums, block_top
from orograph.linalg.low_rank import LowRank
from orograph.studies.networks import mlp

from .networks import loss_cases


@pytest.fixture(scope="module")
def network():
    """A digits-sized network whose Hessian is dense enough to hide nothing, and its record."""
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(400, 20, generator=g, dtype=torch.float64), torch.randint(0, 5, (400,), generator=g)
    model = mlp(20, 12, 8, 5, seed=1).double()
    objective = og.Objective(model, nn.CrossEntropyLoss(), (x, y))
    record = og.measure(objective, "layers", groups={"all weights": "*.weight", "head": ["4.weight", "4.bias"]}, num_samples=4, tol=1e-3, max_products=30)
    return objective, og.hessian(objective).dense(), record


def entries(objective, members):
    return torch.cat([torch.arange(objective.size)[objective.layout[name]] for name in members])


def members_of(objective, row):
    if row["kind"] == "parameter":
        return [row["name"]]
    if row["kind"] == "group":
        return [name for name in objective.names if name.endswith(".weight")] if row["name"] == "all weights" else ["4.weight", "4.bias"]
    return [name for name in objective.names if name.startswith(f"{row['name']}.")]


def test_every_block_matches_the_dense_one_within_its_error(network):
    objective, H, record = network
    rows = record["layers"].rows
    assert {row["kind"] for row in rows} == {"parameter", "module", "group"} and len(rows) == 6 + 3 + 2
    for row in rows:
        where = entries(objective, members_of(objective, row))
        block = H[where][:, where]
        assert row["size"] == len(where)
        assert row["trace"] == pytest.approx(float(block.trace()), abs=4 * row["trace_sem"] + 1e-9)
        assert row["frobenius"] == pytest.approx(float(block.norm()), abs=4 * row["frobenius_sem"] + 1e-9)
        assert row["frobenius"] == pytest.approx(float(block.norm()), rel=0.05)
        top = float(torch.linalg.eigvalsh(block)[-1])
        assert row["top_eigenvalue"] <= top * (1 + 1e-9) and row["top_eigenvalue"] == pytest.approx(top, rel=1e-3)
        assert row["scale_corrected"] == pytest.approx(row["weight_norm"] ** 2 * row["top_eigenvalue"], rel=1e-9)
        assert row["gradient_norm"] == pytest.approx(float(objective.gradient()[where].norm()), rel=1e-9)


def test_layer_traces_add_up_to_the_full_trace(network):
    _, H, record = network
    low, high = record["trace"].interval(0.999)
    assert low <= float(H.trace()) <= high
    assert sum(row["trace"] for row in record["layers"].rows if row["kind"] == "parameter") == pytest.approx(record["trace"].value)


def test_coupling_is_the_norm_of_the_off_diagonal_blocks(network):
    objective, H, record = network
    for row in record["coupling"].rows:
        a, b = (objective.layout[row[axis]] for axis in ("block", "with"))
        assert row["value"] == pytest.approx(float(H[a, b].norm()), rel=0.2, abs=0.02 * float(H.norm()))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_samples_in_one_block_are_calibrated(seed):
    """200 intervals for one block's trace hold the truth about as often as they say."""
    n, generator = 60, torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, generator=generator, dtype=torch.float64)
    A = A + A.T
    op, none = og.LinearOperator.from_dense(A), LowRank(torch.zeros(0, n, dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    blocks, held, squares = [slice(0, 25), slice(25, 60)], 0, []
    for draw in range(100):
        sums = block_sums(op, none, blocks, num_samples=2, seed=1000 * seed + draw, report=lambda done: None)
        for where, estimate in zip(blocks, sums.traces, strict=True):
            low, high = estimate.interval()
            held += low <= float(A[where, where].trace()) <= high
        squares.append(sums.squares)
    assert held >= 176  # 95 % of 200 less four standard deviations
    mean, sem = torch.stack(squares).mean(0), torch.stack(squares).std(0) / 10
    exact = torch.tensor([[float(A[a, b].norm() ** 2) for b in blocks] for a in blocks], dtype=torch.float64)
    assert bool(((mean - exact).abs() <= 4 * sem).all())


def test_a_part_that_is_known_is_not_sampled():
    g = torch.Generator().manual_seed(0)
    Y, _ = torch.linalg.qr(torch.randn(30, 4, generator=g, dtype=torch.float64))
    known = LowRank(Y.T.contiguous(), torch.tensor([5.0, 3.0, 1.0, -2.0], dtype=torch.float64))
    A = Y @ torch.diag(known.values) @ Y.T
    op = og.LinearOperator.from_dense((A + A.T) / 2)
    sums = block_sums(op, known, [slice(0, 10), slice(10, 30)], num_samples=1, seed=0, report=lambda done: None)
    assert float(sums.traces[0].value) == pytest.approx(float(A[:10, :10].trace()), abs=1e-9) and float(sums.traces[0].sem) < 1e-9
    assert float(sums.squares[0, 1]) == pytest.approx(float(A[:10, 10:].norm() ** 2), rel=1e-9)
    pair = block_top(op, known, torch.arange(10), unknown=0.0, tol=1e-6, max_products=10)
    assert pair.value == pytest.approx(float(torch.linalg.eigvalsh(A[:10, :10])[-1]), rel=1e-5)  # a thousandth of the start is random


def test_a_deep_network_of_sigmoids_has_a_vanishing_gradient():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 8, generator=g, dtype=torch.float64), torch.randint(0, 3, (50,), generator=g)
    deep = mlp(8, *[8] * 10, 3, seed=0, activation=nn.Sigmoid).double()
    record = og.measure(og.Objective(deep, nn.CrossEntropyLoss(), (x, y)), "layers")
    flow = record["gradient_flow"].y
    assert len(flow) == 11 and float(flow[0] / flow[-1]) < 1e-2 and "vanishes towards the input" in record.says


def test_layers_refuses_groups_and_budgets_that_make_no_sense():
    objective = loss_cases()["cross-entropy"].objective(100)
    with pytest.raises(ValueError, match="matches no parameter"):
        og.measure(objective, "layers", groups={"attention": "*.attn.*"})
    with pytest.raises(ValueError, match=r"num_samples=0.*at least 1"):
        og.measure(objective, "layers", num_samples=0)
    assert math.isfinite(og.measure(objective, "layers")["layers"].rows[0]["trace"])
