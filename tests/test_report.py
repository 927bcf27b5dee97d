"""The report: a pure function of saved records, whose page draws everything in a real browser without a network."""

import ast
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from orograph.records import Record, Records, load_records, save_records
from orograph.report import write_report
from orograph.report.blocks import DRAW, make_block
from orograph.report.figures import draw_curves, draw_densities, draw_eigenpairs, draw_estimates, draw_spectra
from orograph.report.sections import page_content, seconds_text
from orograph.report.surfaces import draw_surfaces
from orograph.report.tables import draw_bars, draw_heat
from orograph.report.theme import PALETTE, Scale, Series, choose_scale, decade_ticks, plain, spread
from orograph.results import Curve, Density, Estimate, Spectrum, Surface, Table

from .browser import ARGUMENTS, find_browser
from .test_records import ALL_KINDS, make_density, make_eigenpairs, make_spectrum

HOSTILE = "<script>alert('x')</script> & <img src=https://example.com/x onerror=alert(1)>"


def make_surface() -> Surface:
    x, y = torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 5)
    return Surface(x=x, y=y, z=0.1 + x[:, None] ** 2 + 3 * y[None, :] ** 2, evaluations=35, label="loss", unit="nats", xlabel="s", ylabel="t")


def network_records() -> list[Record]:
    """Two networks, as a user would compare them, and one followed through training."""
    records = []
    for label, scale in (("SGD", 1.0), ("Adam " + HOSTILE, 3.0)):
        layers = [{"name": f"layer {i}", "norm": scale * i, "norm_sem": 0.1} for i in range(1, 5)]
        sigma = torch.logspace(-3, 0, 9)
        noise = {
            "loss": Curve(x=sigma, y=sigma**2 * scale + 0.1, error=sigma * 0.1, label="loss", xlabel="σ", ylabel="loss", unit="nats"),
            "quadratic": Curve(x=sigma, y=sigma**2 * scale * 2 + 0.1, label="quadratic model", xlabel="σ", ylabel="loss", unit="nats"),
        }
        norm = Estimate(value=0.5 * scale, sem=0.01, label="gradient norm")
        kept = {"label": label, "provenance": {"torch": "2.13.0", "device": "cpu", "engine": "retained", "seed": 0}}
        records += [
            Record(probe="gradient", results={"norm": norm, "layers": Table(rows=layers, x="name", y="norm", draw="bars")}, says=HOSTILE, **kept),
            Record(probe="spectrum", results={"spectrum": make_spectrum()}, products=1234, reused=56, status="budget-limited", **kept),
            Record(probe="noise", results=noise, missing={"accuracy": "the task is a regression"}, seconds=0.5, settings={"samples": 9}, **kept),
        ]
    marked = Table(rows=[{"name": "SGD", "s": 0.0, "t": 0.0}, {"name": "Adam", "s": 0.5, "t": 0.5}])
    records.append(Record(probe="surface", label="SGD", results={"surface": make_surface(), "points": marked}))
    ratio = lambda step: Estimate(value=step / 10, sem=0.05, label="edge ratio")
    return records + [Record(probe="edge", label="SGD", results={"ratio": ratio(step)}, tags={"step": step}) for step in range(12)]


def page_of(records, tmp_path: Path) -> str:
    """The page without Plotly's own code."""
    text = write_report(records, tmp_path / "report.html").read_text(encoding="utf-8")
    return re.sub(r"<script>/\*\*.*?</script>", "", text, flags=re.DOTALL) if len(text) > 4_000_000 else text


def test_report_is_a_pure_function_of_saved_records(tmp_path):
    save_records(network_records(), tmp_path / "records")
    first = write_report(tmp_path / "records", tmp_path / "new" / "a.html")
    second = write_report(load_records(tmp_path / "records"), str(tmp_path / "b.html"))
    assert first == tmp_path / "new" / "a.html" and first.read_bytes() == second.read_bytes()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.html"]


def test_report_knows_no_model_code():
    allowed = {"results", "records", "errors", "scalars", "durable", "arguments", "checks"}
    for path in (Path(sys.modules["orograph.report"].__file__).parent).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2:
                assert node.module in allowed, f"{path.name} imports {node.module}"


def test_page_holds_plotly_once_and_fetches_nothing(tmp_path):
    text = write_report(network_records(), tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r"\* plotly\.js v", text)) == 1
    page = page_of(network_records(), tmp_path)
    assert len(page) < 300_000 and "default-src 'none'" in page
    elements = re.sub(r"<script type=\"application/json\".*?</script>", "", page, flags=re.DOTALL)
    assert re.findall(r"<link[^>]*>", elements) == ['<link rel="icon" href="data:,">'] and "src=" not in re.sub(r"&lt;.*?&gt;", "", elements)


def test_page_without_figures_is_small(tmp_path):
    assert len(page_of(Record(probe="gradient", results={"norm": Estimate(value=1.0)}), tmp_path)) < 30_000
    assert "No records were given." in page_of([], tmp_path)


def test_text_of_users_cannot_become_markup(tmp_path):
    page = page_of(network_records(), tmp_path)
    assert "<script>alert" not in page and "<img" not in page and "&lt;script&gt;alert" in page
    for data in re.findall(r'<script type="application/json" id="data-\d+">(.*?)</script>', page, flags=re.DOTALL):
        assert "<" not in data
        json.loads(data)
    assert plain("<b>& %{x}") == "&lt;b&gt;&amp; %&#123;x}" and len(plain("x" * 500, 30)) == 30


def test_page_says_what_was_measured_and_what_it_cost(tmp_path):
    page = page_of(network_records(), tmp_path)
    for part in ["19 records from 5 probes", "17 converged, 2 budget-limited", "1,234 products, 56 reused", "accuracy is missing: the task is a regression",
                 "retained", "20.0</b> <span class=\"interval\">[17.7, 22.3]", "share of negative eigenvalues", "samples", 'class="badge budget-limited"']:
        assert part in page, part


def test_numbers_that_are_not_finite_stay_visible(tmp_path):
    rows = [{"bound": "McAllester", "value": math.nan, "kl": math.inf, "vacuous": True}]
    page = page_of(Record(probe="pac_bayes", results={"bounds": Table(rows=rows), "norm": Estimate(value=math.nan)}), tmp_path)
    assert page.count("undefined</b>") == 3 and "inf</b>" in page and "<td>yes</td>" in page and "PAC-Bayes" in page


def test_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"write_report\(\) needs plotly and jinja2: pip install 'orograph\[report\]'"):
        write_report([], tmp_path / "report.html")


def test_networks_are_columns_and_training_steps_are_not():
    content = page_content(Records(network_records()))
    assert [name for name, _ in content["summary"]["columns"]] == ["SGD", "Adam " + HOSTILE] and content["summary"]["axis"] == "step"
    edge = content["sections"][-1]
    assert len(edge["cards"]) == 3 and len(edge["folded"]) == 9 and edge["cards"][-1]["name"] == "SGD · step 11"
    assert next(row for row in content["summary"]["rows"] if row[1] == "edge ratio")[2][0]["main"] == "1.100"  # the latest step


def test_the_same_measurement_made_twice_is_numbered():
    twice = Records([Record(probe="gradient", label="mlp", results={"norm": Estimate(value=float(i))}) for i in range(2)])
    assert [name for name, _ in page_content(twice)["networks"]] == ["mlp", "mlp (2)"]


@pytest.mark.parametrize("name", ALL_KINDS)
@pytest.mark.parametrize("count", [1, 2, 12])
def test_every_kind_is_shown_for_one_or_many_networks(name, count):
    result, figures = ALL_KINDS[name], []
    series = [Series(f"net {i}", result, PALETTE[i % len(PALETTE)]) for i in range(count)]
    block = make_block(name, type(result), series, figures)
    assert len(block["drawings"]) == len(figures) and (figures or block["tiles"] or block["table"] or block["notes"])


@pytest.mark.parametrize("kind", DRAW)
def test_what_has_no_finite_value_is_said_not_drawn(kind):
    nothing, none = torch.full((3,), math.nan), torch.zeros(0)
    empty = replace(make_density(), nodes=torch.zeros(0, 0), weights=torch.zeros(0, 0), atoms=none)
    pairs = replace(make_eigenpairs([1.0]), values=none, vectors=None, residuals=none, converged=none > 0, intervals=torch.zeros(0, 2))
    result = {
        Estimate: Estimate(value=nothing), Density: empty, Curve: Curve(x=torch.arange(3.0), y=nothing), type(pairs): pairs,
        Surface: Surface(x=nothing, y=nothing, z=torch.full((3, 3), math.inf)), Spectrum: replace(make_spectrum(), top=pairs, bottom=pairs, density=empty),
    }[kind]
    block = make_block("x", kind, [Series("net", result)], [])
    assert not block["drawings"] and block["notes"] == ["net: no finite values to draw."]


def test_estimates_over_a_numeric_tag_are_a_line():
    series = [Series(f"step {i}", Estimate(value=float(i), sem=0.1), at=float(i), axis="step", group="net") for i in (2, 0, 1)]
    (drawing,) = draw_estimates(series)
    (line,) = drawing.figure.data
    assert list(line.x) == [0, 1, 2] and line.mode == "lines+markers" and drawing.figure.layout.xaxis.title.text == "step"
    assert line.error_y.array == pytest.approx([0.196] * 3, abs=1e-3)


def test_eigenvalues_over_a_numeric_tag_are_a_line_for_each_rank():
    series = [Series(f"step {i}", make_spectrum(), at=float(i), axis="step", group="net") for i in range(4)]
    lines = draw_spectra(series)[0].figure.data
    assert [line.name for line in lines] == ["net, rank 1", "net, rank 2", "net, rank n"] and all(len(line.x) == 4 for line in lines)


def test_eigenvalues_show_their_intervals_and_convergence():
    (drawing,) = draw_eigenpairs([Series("net", make_eigenpairs([9.0, 4.0]))])
    (dots,) = drawing.figure.data
    assert list(dots.y) == [9, 4] and list(dots.error_y.array) == [0.5, 0.5] and list(dots.marker.symbol) == ["circle", "circle-open"]
    assert "residual" in dots.hovertext[0] and "Open circles: not converged" in drawing.caption


def test_density_with_far_outliers_gets_an_axis_that_shows_both():
    nodes = torch.randn(4, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.01
    density = Density(nodes=nodes, weights=torch.full_like(nodes, 0.02), atoms=torch.tensor([30.0]).double(), size=1000, width=0.002)
    (drawing,) = draw_densities([Series("net", density)])
    line, _, atoms = drawing.figure.data
    peak = float(line.x[np.nanargmax(line.y)])
    assert "logarithmic beyond" in drawing.caption and "standard deviation 0.002" in drawing.caption
    assert abs(peak) < 1 < float(atoms.x[0]) < 5  # bulk and outlier are some decades apart, not a factor of 3,000
    assert "10" in drawing.figure.layout.xaxis.ticktext and drawing.figure.layout.yaxis.type == "log"
    (near,) = draw_densities([Series("net", replace(density, atoms=torch.tensor([0.1]).double()))])
    assert "logarithmic" not in near.caption


def test_gaps_stay_gaps():
    (drawing,) = draw_curves([Series("net", ALL_KINDS["curve"])])
    assert drawing.figure.data[0].y[0] == 1 and np.isnan(drawing.figure.data[0].y[1]) and np.isinf(drawing.figure.data[0].y[2])


def test_curve_band_is_the_95_percent_interval():
    curve = Curve(x=torch.arange(3.0), y=torch.ones(3), error=torch.full((3,), 0.5))
    low, high, line = draw_curves([Series("net", curve)])[0].figure.data
    assert low.y == pytest.approx([0.02] * 3, abs=1e-3) and high.y == pytest.approx([1.98] * 3, abs=1e-3) and high.fill == "tonexty"
    assert list(line.y) == [1, 1, 1]


def test_surface_has_x_across_y_up_and_its_marks():
    marks = [{"name": "a", "s": 0.0, "t": 0.5}, {"name": "b", "s": "no number", "t": 0.5}]
    contours, relief = draw_surfaces([Series("net", make_surface(), marks=marks)])
    z = np.asarray(contours.figure.data[0].customdata)
    assert z.shape == (5, 7) and z[0, 3] == pytest.approx(3.1) and z[2, 0] == pytest.approx(1.1)
    assert list(contours.figure.data[1].x) == [0] and list(contours.figure.data[1].y) == [0.5]
    assert relief.figure.data[0].type == "surface" and contours.figure.layout.xaxis.title.text == "s"


def test_flat_and_small_surfaces_are_drawn():
    (flat,) = draw_surfaces([Series("net", Surface(x=torch.arange(2.0), y=torch.arange(2.0), z=torch.ones(2, 2)))])
    assert flat.figure.data[0].zmin < 1 < flat.figure.data[0].zmax


def test_bars_and_maps_of_tables():
    rows = [{"name": "a", "value": 2.0, "error": 0.5}, {"name": "b", "value": math.nan}, {"name": "c"}]
    (bars,) = draw_bars([Series("net", Table(rows=rows, x="name", y="value", draw="bars"))])
    assert list(bars.figure.data[0].y) == ["a", "b"] and bars.figure.data[0].error_x.array[0] == pytest.approx(0.98, abs=1e-2)
    (heat,) = draw_heat([Series("net", Table(rows=[{"i": 0, "j": 1, "v": 5.0}, {"i": 1, "j": 0, "v": 6.0}], x="i", y="j", draw="heat"))])
    assert heat.figure.data[0].z[0][0] == 5 and math.isnan(heat.figure.data[0].z[0][1])


def test_scales_spread_what_outliers_would_hide():
    assert choose_scale([1, 2, 3]).kind == "linear" and choose_scale([1, 1, 100]).kind == "log" and choose_scale([]).kind == "linear"
    scale = choose_scale([-0.02, 0.03, 50.0])
    assert scale == Scale("symlog", 0.01) and scale.note == "axis linear within ±0.01, logarithmic beyond"
    assert scale.place([100.0]) - scale.place([10.0]) == pytest.approx(1, abs=1e-5) and scale.place([-5.0]) == -scale.place([5.0])
    assert list(scale.axis("x", [-0.5, 50.0])["ticktext"]) == ["−0.1", "0", "0.1", "1", "10"]
    assert decade_ticks(0.02, 900.0)["ticktext"] == ["10⁻²", "10⁻¹", "10⁰", "10¹", "10²", "10³"] and decade_ticks(1.0, 2.0) == {}


def test_durations_and_colours():
    assert [seconds_text(s) for s in (0.123, 65.4, 600.0, 9000.0)] == ["0.12 s", "65 s", "10.0 min", "2.5 h"]
    assert spread(3)[0] == PALETTE[0] and spread(3)[-1] == PALETTE[1] and spread(1) == [PALETTE[0]]


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS)
        yield chromium
        chromium.close()


DRAWN = """() => [...document.querySelectorAll(".figure")].map(holder =>
    holder.querySelectorAll(".main-svg").length > 0 && holder.querySelectorAll(".trace, .contour, .hm, .gl-container canvas").length > 0)"""


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_draws_everything_offline_at_any_width(browser, tmp_path, width, scheme):
    kinds = [Record(probe="every_kind", results=ALL_KINDS, label=name) for name in ("SGD", "Adam")]
    path, troubles, requests = write_report([*network_records(), *kinds], tmp_path / "report.html"), [], []
    with browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True) as context:
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: (troubles.append("a dialog opened"), dialog.dismiss()))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_function(f"({DRAWN})().every(Boolean)", timeout=20_000)
        drawn = page.evaluate(DRAWN)
        assert len(drawn) > 15 and all(drawn)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("[...document.querySelectorAll('.figure')].every(f => f.firstElementChild.scrollWidth <= f.clientWidth + 1)")
        buttons = page.evaluate("[...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)")
        assert "Zoom in" in buttons and not [title for title in buttons if "Share" in title or "Cloud" in title]  # nothing is uploaded
        ink = page.evaluate("getComputedStyle(document.querySelector('.figure .xtick text')).fill")
        assert (sum(map(int, re.findall(r"\d+", ink)[:3])) > 384) == (scheme == "dark")  # light text on dark ground
        assert troubles == [] and {url for url in requests if not url.startswith(("data:", "blob:"))} == {path.as_uri()}


def test_missing_browser_is_a_failure_that_names_the_cure(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PLAYWRIGHT_BROWSERS_PATH", raising=False)
    with pytest.raises(FileNotFoundError, match=r"Install one: sh tools/install-browser\.sh"):
        find_browser()
