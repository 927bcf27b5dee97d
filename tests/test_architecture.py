"""Imports run downwards, files stay short, the public surface is what is documented."""

import ast
from pathlib import Path

import pytest

import orograph

ROOT = Path(orograph.__file__).parent
ROWS = [  # a module imports from rows above it, or from the left of its own row
    ["errors", "restoring", "surroundings", "ranges", "arguments", "expected", "checks", "results", "progress", "memory", "durable"],
    ["kernels", "layout", "axes", "axis_rules", "layer_axis_rules", "tracing", "decisions", "linalg.symmetry", "linalg.operator", "linalg.checkpoints", "linalg.lanczos", "linalg.power", "linalg.search", "linalg.lobpcg", "linalg.eigen", "linalg.intervals", "linalg.trace_methods", "linalg.runs", "linalg.low_rank", "linalg.trust_region", "linalg.blocks", "linalg.remainder", "linalg.traces", "linalg.density", "linalg.one_pass", "linalg.spectra", "state", "deep_copies"],
    ["nesting", "reached", "loaders", "batches", "criteria", "terms", "evaluation", "weighting", "proof", "points", "snapshots", "cutting", "reading", "copies", "objective", "identity", "variants", "suspects", "crowds"],
    ["products.sweeps", "products.reverse", "products.gauss_newton", "products.likelihood", "products.blockwise", "products.difference", "products.choice", "comparison", "criterion_proof", "preflight", "certified", "curvature", "subsets", "paths", "renormalise", "perturbations", "ascent", "optimizers", "bounds", "example_groups", "watching", "symmetries", "weight_matching", "activation_matching", "alignment", "curves", "bands", "profiles", "planes", "chebyshev", "grids", "refinement", "topology", "minima", "samples", "pictures"],
    ["encoding", "scalars", "record_text", "paper", "exports", "records", "subject", "edge_verdicts", "sharpness_zoo", "registry"],
    ["probes"],
    ["studies.problems", "studies.networks", "studies.training", "studies.instability", "report.theme", "report.tables", "report.figures", "report.surfaces", "report.blocks", "report.sections", "report.page", "report"],
    ["demo", "tasks"],
    ["cli"],
]  # fmt: skip
PLACE = {name: (row, column) for row, names in enumerate(ROWS) for column, name in enumerate(names)}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def place(name):
    """Row and column of a module; every probe stands in the row of probes."""
    return PLACE["probes"] if name.startswith("probes.") else PLACE.get(name)


def imports_of(name):
    """Modules of the package that a module imports, at its top or inside functions."""
    package = name.split(".") if FILES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            full = ".".join(base)
            yield from ([full] if full in FILES and full else [".".join([*base, alias.name]) for alias in node.names])
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("orograph") for alias in node.names), f"{name}: absolute import of the package"


@pytest.mark.parametrize("name", [n for n in FILES if n and n not in ("linalg", "products", "studies", "probes")])
def test_imports_run_downwards(name):
    assert place(name), f"{name} stands in no row: add it to ROWS and to docs/architecture.md"
    for other in imports_of(name):
        assert other in FILES and other, f"{name} imports {other!r}"
        if name.startswith("probes.") and other.startswith("probes."):
            pytest.fail("probes never import one another")
        assert place(other) < place(name), f"{name} imports {other}, which does not stand above it"


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    text = FILES[name].read_text()
    assert len(text.splitlines()) <= 310
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = (ast.get_docstring(node) or "").count("\n") + 1
            assert node.end_lineno - node.lineno - docstring <= 55, f"{name}.{node.name}"


def test_public_names_are_sorted_complete_and_documented():
    assert list(orograph.__all__) == sorted(orograph.__all__)
    own = {name for name in vars(orograph) if not name.startswith("_") and getattr(vars(orograph)[name], "__module__", "").startswith("orograph")}
    assert own <= set(orograph.__all__)
    documented = (ROOT.parent.parent / "docs" / "architecture.md").read_text()
    assert [name for name in orograph.__all__ if f"`{name}" not in documented] == []
    for name in orograph.__all__:
        assert getattr(orograph, name).__doc__ or name == "Result", f"{name} has no docstring"


def test_no_public_function_shares_its_name_with_a_module():
    modules = {name.split(".")[-1] for name in FILES if name and not name.startswith("probes.")}
    assert not modules & set(orograph.__all__)


def test_importing_is_light():
    import subprocess
    import sys

    code = "import sys, orograph; print([m for m in ('plotly', 'sklearn', 'jinja2', 'typer', 'pandas', 'transformers', 'matplotlib', 'h5py') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
