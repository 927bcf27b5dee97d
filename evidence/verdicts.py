"""No false verdict: what Orograph says of a network against what is so, each family whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

from tests import test_compared_networks, test_edge_verdicts, test_fisher_scale, test_minima, test_pac_bayes, test_ranges

from .tables import Row, holds


def _count(checks: list[Callable[[], object]]) -> str:
    return f"{sum(map(holds, checks))} of {len(checks)}"


def _row(claim: str, checks: list[Callable[[], object]]) -> Row:
    measured = _count(checks)
    return (claim, measured, "all", measured == f"{len(checks)} of {len(checks)}")


def stability_verdicts() -> list[Row]:
    """Trainings that go on well, and rates at which the loss blows up."""
    tests = test_edge_verdicts
    told = Counter[str]()
    for case in tests.TRAINED:
        try:
            told["right" if tests.healthy_trainings_are_not_beyond(*case) else "not healthy"] += 1
        except AssertionError:
            told["false"] += 1
    healthy = told["right"] + told["false"]
    claim = f"{len(tests.NETWORKS)} networks x {len(tests.OPTIMIZERS)} optimisers x {len(tests.SCHEDULES)} trainings"
    rows = [(f"{claim}: healthy ones that are not called beyond the edge", f"{told['right']} of {healthy}", "all", not told["false"])]
    broke = Counter[str]()
    for raised in tests.RAISED:
        try:
            broke["told" if tests.a_raised_rate_is_told(*raised) else "survived"] += 1
        except AssertionError:
            broke["missed"] += 1
    total = broke["told"] + broke["missed"]
    rows.append(("the same at 300 times the rate: of those that blow up, not called below the edge", f"{broke['told']} of {total}", "all", not broke["missed"]))
    named: list[Callable[[], object]] = [
        partial(tests.test_biases_in_front_of_batchnorm_are_named_and_left_out, network, optimizer)
        for network in tests.WITHOUT_GRADIENT for optimizer in ("Adam", "AdamW", "NAdam", "RMSprop", "Adagrad")
    ]  # fmt: skip
    rows.append(_row("biases in front of BatchNorm: named, and the edge given without them", named))
    figures: list[Callable[[], object]] = [partial(tests.figures_agree, name) for name in tests.FIGURES]
    rows.append(_row("optimisers and hyperparameters: ratio, largest stable rate and sentence agree with running it, to 1 %", figures))
    return rows


def compared_networks() -> list[Row]:
    """Barriers by one policy, unequal losses, metrics that would replace the loss."""
    tests = test_compared_networks
    policies: list[Callable[[], object]] = [partial(tests.test_a_path_has_one_policy_from_end_to_end, policy, kind) for policy in tests.POLICIES for kind in ("line", "chain", "curve")]
    said: list[Callable[[], object]] = [partial(tests.losses_are_said, *case) for case in tests.CASES]
    return [_row("paths: every loss, the ends too, by one policy for running statistics", policies), _row("unequal losses are said, and equal ones are not", said)]


def minima() -> list[Row]:
    """False and missed minima of functions with known ones."""
    tests = test_minima
    false, missed, right = 0, 0, 0
    for case in tests.CASES:
        extra, lacking, _ = tests.false_and_missed(*case)
        false, missed, right = false + extra, missed + lacking, right + (extra == lacking == 0)
    size = len(tests.CASES)
    claim = f"{len(tests.FUNCTIONS)} functions x {len(tests.TURNS)} turns x {len(tests.GRIDS)} grids: significant minima are those of the function"
    return [(claim, f"{right} of {size}; {false} false, {missed} missed", "all", right == size)]


def bounds_and_fisher() -> list[Row]:
    """Test bounds that are none; both Fisher matrices by their definition."""
    none: list[Callable[[], object]] = [partial(test_pac_bayes.test_a_test_bound_that_is_none_is_not_told_as_one, test_pac_bayes.loss_cases()["cross-entropy"].objective(100), case) for case in test_pac_bayes.NO_BOUND]
    tests = test_fisher_scale
    definition: list[Callable[[], object]] = [partial(tests.is_its_definition, *case) for case in tests.CASES]
    scale: list[Callable[[], object]] = [partial(tests.has_the_scale_of_the_ggn, *case) for case in tests.LIKELIHOODS]
    return [
        _row("test bounds that are none are not told", none),
        _row("empirical Fisher of torch's losses x reductions: its definition, to 1e-8", definition),
        _row("labels drawn from the model: both Fishers are the GGN, to 6 %", scale),
    ]


def ranges() -> list[Row]:
    """Numbers, intervals and sentences of degenerate networks."""
    checks: list[Callable[[], object]] = [partial(test_ranges.stays_within_its_range, *case) for case in test_ranges.CASES]
    return [_row(f"{len(test_ranges.NETWORKS)} networks, degenerate ones among them, x {len(test_ranges.PROBES)} probes: within what is possible, no bare nan or round-off", checks)]


SECTIONS: list[Callable[[], list[Row]]] = [stability_verdicts, compared_networks, minima, bounds_and_fisher, ranges]
