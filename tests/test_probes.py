"""Contract of every registered probe, and what measure and measure_all promise."""

import json

import pytest
import torch
from torch import nn

import orograph as og
from orograph.registry import _probes, find_probe
from orograph.results import RESULT_KINDS

from .networks import loss_cases, small_mlp
from .test_snapshot import state_of

CASES = loss_cases()
EXPECTED = {
    "gradient": {"norm", "layers"}, "spectrum": {"spectrum"}, "barrier": {"path", "error_path", "barriers"}, "layers": {"layers"}, "conditioning": {"conditioning"},
    "sharpness": {"sharpness"}, "noise": {"loss", "accuracy", "quadratic", "window", "sigma_at_drop"}, "pac_bayes": {"certificates", "test_bound"},
    "stability": {"critical_rate", "directional", "edge_ratio"}, "connectivity": {"stages", "merged"}, "basins": {"pairs", "minimax", "tree"},
}  # fmt: skip
COLUMNS = {
    "layers": {"name", "size", "trace", "trace_sem", "top_eigenvalue", "frobenius", "gradient_norm", "weight_norm"}, "conditioning": {"definition", "value", "error"},
    "sharpness": {"definition", "value", "error", "found", "quadratic", "radius"},
    "stages": {"stage", "barrier", "lower", "upper", "length", "seconds"},
    "certificates": {"bound", "value", "empirical", "kl", "sigma", "n", "delta", "vacuous"},
}  # fmt: skip


def networks_for(name, objective):
    """As many networks as a probe takes."""
    wanted = find_probe(name).points
    count = 3 if wanted and wanted[0].startswith("*") else len(wanted)
    return [objective.at(objective.theta + 0.1 * i * objective.space.sample(0, i, "normal")).point(label=f"network {i}") for i in range(count)]


@pytest.fixture(scope="module")
def objective():
    return CASES["cross-entropy"].objective(100)


@pytest.fixture(scope="module")
def records(objective):
    return {name: og.measure(objective, name, *networks_for(name, objective), tags={"run": 1}) for name in og.list_probes()}


@pytest.mark.parametrize("name", og.list_probes())
class TestContract:
    def test_results_are_of_the_closed_set_and_have_the_fixed_names(self, name, records):
        record = records[name]
        assert record.results and all(type(result).__name__ in RESULT_KINDS for result in record.results.values())
        assert EXPECTED.get(name, set()) <= set(record.results) | set(record.missing)
        table = {"pac_bayes": "certificates", "connectivity": "stages"}.get(name, name)
        if table in COLUMNS:
            assert all(COLUMNS[table] <= set(row) for row in record[table].rows)

    def test_it_says_one_plain_sentence(self, name, records):
        assert records[name].says.strip().endswith(".") and 20 < len(records[name].says) < 500

    def test_settings_are_json_and_recorded(self, name, records):
        assert json.loads(json.dumps(records[name].settings)) == find_probe(name).settings

    def test_provenance_says_where_the_number_comes_from(self, name, records):
        provenance = records[name].provenance
        assert {"orograph", "torch", "device", "dtype", "mode", "fingerprints", "examples", "parameters"} <= set(provenance)
        json.dumps(provenance)

    def test_same_seed_same_results(self, name, records, objective):
        again = og.measure(objective, name, *networks_for(name, objective))
        for key, result in again.results.items():
            if isinstance(result, og.Estimate):
                assert result.value == pytest.approx(records[name][key].value, rel=1e-9)  # a few roundings depend on where arrays lie
            if isinstance(result, og.Spectrum):
                assert torch.equal(result.top.values, records[name][key].top.values) and result.trace.value == records[name][key].trace.value

    def test_record_survives_the_store_and_is_drawn(self, name, records, tmp_path):
        og.save_records(records[name], tmp_path)
        (back,) = og.load_records(tmp_path)
        assert str(back).splitlines()[0] == str(records[name]).splitlines()[0] and set(back.results) == set(records[name].results)
        page = og.write_report(tmp_path, tmp_path / "report.html").read_text()
        assert records[name].says.split(":")[0][:30] in page

    def test_no_trace(self, name, objective):
        model = CASES["cross-entropy"].model
        kept = state_of(model)
        og.measure(objective, name, *networks_for(name, objective))
        assert state_of(model) == kept

    def test_missing_networks_are_named(self, name, objective):
        wanted = find_probe(name).points
        if wanted and not wanted[0].startswith("*"):
            with pytest.raises(TypeError, match=f"missing: {', '.join(wanted)}"):
                og.measure(objective, name)

    def test_a_network_in_batch_mode_and_with_running_statistics(self, name):
        net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
        x, y = CASES["cross-entropy"].data
        here = og.Objective(net, nn.CrossEntropyLoss(), [(x[:100], y[:100]), (x[100:], y[100:])], mode="batch")
        assert og.measure(here, name, *networks_for(name, here)).results


def test_gradient_norms_match_autograd(records, objective):
    model = CASES["cross-entropy"].model
    grads = torch.autograd.grad(CASES["cross-entropy"].whole(model), list(model.parameters()))
    record = records["gradient"]
    assert record["norm"].value == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-12)
    for row, g, p in zip(record["layers"].rows, grads, model.parameters(), strict=True):
        assert row["norm"] == pytest.approx(g.norm().item(), rel=1e-12) and row["weight_norm"] == pytest.approx(p.norm().item(), rel=1e-12)
    assert record["loss"].value == objective.value() and record["accuracy"].value == objective.metrics()["accuracy"]


def test_spectrum_probe_matches_the_dense_matrix(records, objective):
    H = og.hessian(objective).dense()
    values = torch.linalg.eigvalsh(H).flip(0)
    s = records["spectrum"]["spectrum"]
    assert torch.allclose(s.top.values, values[:10], rtol=1e-4) and float(s.bottom.values[0]) == pytest.approx(float(values[-1]), rel=1e-4)
    low, high = s.trace.interval()
    assert low <= float(H.trace()) <= high
    assert f"{2 / float(values[0]):.3g}" in records["spectrum"].says


def test_barrier_of_every_definition_on_a_quadratic():
    x = torch.randn(80, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = torch.randn(80, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    objective = og.Objective(model, lambda o, t: -((o - t) ** 2).mean(), (x, target))  # concave: a barrier in the middle
    g = torch.Generator().manual_seed(2)
    a, b = (torch.randn(objective.size, generator=g, dtype=torch.float64) for _ in range(2))
    record = og.measure(objective, "barrier", a, b, resolution=401)
    la, lb, d = objective.at(a).value(), objective.at(b).value(), b - a
    c = float(d @ (og.hessian(objective) @ d))  # L(t) = (1-t) la + t lb - t (1-t) c / 2
    rows = {row["definition"]: row for row in record["barriers"].rows}
    t = record["path"].x
    assert len(t) > 401  # refined around the maximum
    line = (1 - t) * la + t * lb - t * (1 - t) * c / 2
    assert torch.allclose(record["path"].y, line, rtol=1e-10)
    assert rows["over the chord"]["value"] == pytest.approx(-c / 8, rel=1e-10) and rows["over the chord"]["t"] == 0.5
    assert rows["over the mean of the ends"]["value"] == pytest.approx(float(line.max()) - (la + lb) / 2, rel=1e-10)
    assert rows["over the larger end"]["value"] == pytest.approx(float(line.max()) - max(la, lb), rel=1e-10)
    assert "error_path" in record.missing and "lower, upper" in record.missing


def test_barrier_intervals_come_from_paired_examples_and_held_out_data_have_rows_of_their_own(records, objective):
    case = CASES["cross-entropy"]
    held_out = objective.on((case.data[0][:90], case.data[1][:90]))
    record = og.measure(objective, "barrier", *networks_for("barrier", objective), held_out=held_out)
    assert {row["split"] for row in record["barriers"].rows} == {"train", "held out"} and "path_held_out" in record.results
    for row in record["barriers"].rows:
        assert row["lower"] <= row["value"] <= row["upper"]


def test_measure_all_shares_findings_and_each_record_says_what_it_spent_and_reused(objective):
    names = ["conditioning", "stability", "layers", "spectrum", "noise", "gradient"]
    alone = og.measure(objective, "spectrum").products
    records = {record.probe: record for record in og.measure_all(objective, names)}
    assert list(records) == names  # in the order asked for, though the spectrum comes first
    assert records["spectrum"].products == alone and records["spectrum"].reused == 0
    assert records["noise"].products == 0 and records["noise"].reused == alone
    assert records["stability"].products + records["conditioning"].products < alone and records["stability"].reused >= alone
    apart = og.measure(objective, "conditioning")
    assert apart.products == alone + records["conditioning"].products and apart.reused == 0


def test_measure_all_shares_the_operator_and_counts(objective):
    records = og.measure_all(objective, ["gradient", "spectrum", "barrier"], *networks_for("barrier", objective), settings={"spectrum": {"k": 3}}, tags={"step": 5})
    assert [record.probe for record in records] == ["gradient", "spectrum", "barrier"] and all(record.tags == {"step": 5} for record in records)
    assert records[0].products == 0 and records[1].products == records[1]["spectrum"].products > 0 and records[1].settings["k"] == 3
    assert records[1].provenance["operators"]["hessian"]["engine"] == "retained"
    with pytest.raises(ValueError, match="names barrier, which is not among"):
        og.measure_all(objective, ["gradient"], settings={"barrier": {}})


def test_users_probe_is_one_function(objective, tmp_path):
    @og.probe(says=lambda results: f"The weights have norm {results['norm'].value:.3g}.")
    def weight_norm(subject, *, power: float = 2.0):
        """Norm of all weights."""
        return {"norm": og.Estimate(value=float(subject.objective.theta.norm(power)), label="weight norm")}

    try:
        assert "weight_norm" in og.list_probes() and find_probe("weight_norm").settings == {"power": 2.0}
        record = og.measure(objective, "weight_norm")
        assert record["norm"].value == pytest.approx(float(objective.theta.norm())) and record.says.startswith("The weights have norm")
        assert "weight norm" in og.write_report(record, tmp_path / "r.html").read_text()
        with pytest.raises(ValueError, match="there is already a probe 'gradient'"):
            og.probe(type(weight_norm)(weight_norm.__code__, weight_norm.__globals__, "gradient"))
    finally:
        del _probes["weight_norm"]


def test_products_that_a_probe_does_not_report_are_spent_and_not_reused(objective):
    @og.probe(says=lambda results: "One product of the Hessian was spent on this number.")
    def one_product(subject):
        """Length of one product."""
        op = subject.hessian()
        return {"length": og.Estimate(value=float((op @ op.space.sample(0, 0, "normal")).norm()))}

    try:
        record = og.measure(objective, "one_product")
        assert (record.products, record.reused) == (1, 0)
    finally:
        del _probes["one_product"]


def test_held_out_data_of_another_architecture_are_refused(objective):
    other = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = CASES["cross-entropy"].data
    with pytest.raises(ValueError, match="another architecture"):
        og.measure(objective, "gradient", held_out=og.Objective(other, nn.CrossEntropyLoss(), (x[:90], y[:90])))


def test_held_out_data_that_are_no_other_data_are_refused(objective):
    with pytest.raises(ValueError, match="the very data of the objective"):
        og.measure(objective, "gradient", held_out=objective.at(objective.theta + 1))
    with pytest.raises(TypeError, match=r"held_out=.*needs an Objective"):
        og.measure(objective, "gradient", held_out=CASES["cross-entropy"].data)


def test_misspelt_and_misplaced_names_are_answered(objective):
    with pytest.raises(ValueError, match="Did you mean 'spectrum'"):
        og.measure(objective, "spectrm")
    with pytest.raises(TypeError, match=r"name=.*needs a text"):
        og.measure(objective, ["gradient", "spectrum"])
    with pytest.raises(TypeError, match=r"names='gradient'.*needs a sequence"):
        og.measure_all(objective, "gradient")
    for settings, message in (({"k": -1}, "whole number"), ({"k": "5"}, "whole number"), ({"rel_error": 0}, "above 0")):
        with pytest.raises((ValueError, TypeError), match=message):
            og.measure(objective, "spectrum", **settings)


def test_labels_tell_two_networks_of_one_class_apart(objective):
    record = og.measure(objective, "barrier", small_mlp(seed=1), small_mlp(seed=2))
    assert record.label == "Sequential a – Sequential b"
