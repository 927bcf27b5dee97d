"""Claims about the trace of operators with many equal eigenvalues: part of `make evidence-6`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tests.test_traces import FLAT, operator

from orograph import trace

from .tables import Row

SEEDS = (1, 2, 3)


def trace_rows() -> list[Row]:
    """The trace to 1 % of 50 equal eigenvalues over flat bulks, n = 1000, against XTrace."""
    rows: list[Row] = []
    for name, bulk in FLAT.items():
        for large in (10.0, 100.0):
            values = torch.cat([torch.full((50,), large, dtype=torch.float64), bulk])
            spent: dict[str, list[int]] = {"auto": [], "xtrace": [], "hutchinson": []}
            right = True
            for seed in SEEDS:
                for method, products in spent.items():
                    op = operator(values, memory="1GiB")
                    found = trace(op, method=method, rel_error=0.01, max_products=900, seed=seed)  # type: ignore[arg-type]
                    products.append(found.products)
                    off = abs(float(found.value) - float(values.sum()))
                    right = right and off <= 4 * float(found.sem)
            ours, theirs, plain = (sum(products) / len(SEEDS) for products in spent.values())
            text = f"{ours:.0f} / {theirs:.0f} (Hutchinson {plain:.0f}); errors as stated: {right}"
            claim = f"trace to 1 %: 50 eigenvalues {large:g}, bulk {name}; products / XTrace's"
            rows.append((claim, text, "<= XTrace's", ours <= theirs and right))
    return rows


SECTIONS: list[Callable[[], list[Row]]] = [trace_rows]
