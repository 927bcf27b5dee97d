"""The data's share of an error."""

import pytest
import torch
from torch import nn

from orograph import NotDeterministic, Objective, OrographWarning, data_error, eigenpairs, hessian, trace

from .networks import small_mlp


def problem(n, seed):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=g, dtype=torch.float64), torch.randint(0, 3, (n,), generator=g)


def exact_trace(objective):
    return float(hessian(objective, check=False).dense().trace())


def test_trace_on_a_sample_covers_the_trace_of_the_whole_population():
    model = small_mlp()
    truth = exact_trace(Objective(model, nn.CrossEntropyLoss(), problem(20_000, 0)))
    inside = 0
    for seed in range(1, 41):
        estimate = data_error(Objective(model, nn.CrossEntropyLoss(), problem(400, seed)), exact_trace, seed=seed)
        low, high = estimate.interval()
        inside += low <= truth <= high
    assert inside >= 34  # 95 % of 40, less three standard deviations


def test_lambda_max_on_subsets_is_larger_and_said_to_be():
    model = small_mlp(4, 20, 3)
    objective = Objective(model, nn.CrossEntropyLoss(), problem(120, 1))
    with pytest.warns(OrographWarning, match=r"larger: it depends on the amount of data.*biased upward"):
        estimate = data_error(objective, lambda o: eigenpairs(hessian(o)), parts=12)
    assert float(estimate.value) == pytest.approx(float(eigenpairs(hessian(objective)).values[0]), rel=1e-3) and estimate.sem > 0


def test_parts_are_disjoint_and_the_whole():
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), problem(101, 2), batch_size=30)
    parts = objective.split(4, seed=0)
    assert [part.examples for part in parts] == [26, 25, 25, 25]
    assert sum(part.value() * part.units for part in parts) / objective.units == pytest.approx(objective.value(), rel=1e-12)


def test_error_of_the_statistic_and_of_the_data_add_up():
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), problem(200, 3))
    data_only = data_error(objective, exact_trace)
    both = data_error(objective, lambda o: trace(hessian(o, check=False), rel_error=None, max_products=20, seed=0))
    assert both.sem > 0.5 * data_only.sem and both.dof >= 3


def test_bad_splits_are_refused():
    objective = Objective(small_mlp(), nn.CrossEntropyLoss(), problem(20, 3))
    with pytest.raises(ValueError, match=r"parts=.*at least 3"):
        data_error(objective, exact_trace, parts=2)
    with pytest.raises(ValueError, match="split\\(parts=21\\)"):
        objective.split(21, seed=0)
    with pytest.raises(ValueError, match="would cut batches"):
        Objective(small_mlp(), nn.CrossEntropyLoss(), problem(20, 3), mode="batch").split(3, seed=0)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*problem(20, 3)), batch_size=5, shuffle=True)
    big = Objective(small_mlp(), nn.CrossEntropyLoss(), loader)
    with pytest.raises(NotDeterministic, match="one fixed order"):
        big.split(3, seed=0)
