"""Which of several networks lie in one basin: barriers of all pairs, and the lowest way between any two through the others."""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

from ..alignment import align
from ..arguments import Grid, Seed
from ..paths import Line
from ..profiles import Profile, Statistics, ends_table, policy_words, remarks, trace_path
from ..progress import progress_bar
from ..registry import Results, probe
from ..results import Point, Result, Table
from ..subject import Subject


def _says(results: Results) -> str:
    table, tree = results["pairs"], results["tree"]
    assert isinstance(table, Table) and isinstance(tree, Table)
    worst = max(tree.rows, key=lambda row: float(row["barrier"]), default=None)
    if worst is None:
        return "One network alone is one basin."
    return f"All networks can be reached from each other over straight lines with a barrier of at most {worst['barrier']:.3g}, between {worst['a']} and {worst['b']}; the highest direct one is {max(row['barrier'] for row in table.rows):.3g}.{remarks(results['networks'], table.rows[0]['statistics'])}"


@probe(says=_says)
def basins(subject: Subject, *points: Point, resolution: Grid = 11, align_to_first: bool = False, statistics: Statistics = "interpolated", seed: Seed = 0) -> dict[str, Result]:
    r"""Loss barriers on the straight lines between all pairs of K networks, and the tree of the lowest ways.

    `pairs`: barrier over the chord for every pair, with its 95 % interval · `minimax`: the lowest barrier over all chains of straight lines between two networks ·
    `tree`: the lines of the minimum spanning tree, which has all of these ways (Draxler et al. 2018, arXiv:1803.00885) · `align_to_first`: units of all in the
    first one's order. Costs about `resolution` + 30 forward passes for each of the K (K - 1) / 2 pairs.
    """
    if len(points) < 2:
        raise TypeError(f"basins compares two networks or more, got {len(points)}. Use measure(objective, 'basins', a, b, ...).")
    nets = [points[0], *(align(subject.objective, points[0], point, seed=seed).point for point in points[1:])] if align_to_first else list(points)
    names = [point.label for point in points]
    rows: list[dict[str, Any]] = []
    policy, ends = policy_words(statistics, subject.objective), dict[str, tuple[Profile, float]]()
    with progress_bar(subject.progress, "pairs", unit="point") as report:
        for i, j in combinations(range(len(nets)), 2):
            profile = trace_path(subject.objective, Line(nets[i], nets[j]), statistics=statistics, resolution=resolution, report=report)
            chord = profile.barriers("loss", "train")[0]
            ends |= {names[i]: (profile, 0.0), names[j]: (profile, 1.0)}
            rows.append({"a": names[i], "b": names[j], "barrier": max(chord["value"], 0.0), "barrier_sem": chord["sem"], "lower": chord["lower"], "upper": chord["upper"], "t": chord["t"], "length": Line(nets[i], nets[j]).length(), "statistics": policy})
    heights = {(i, j): row["barrier"] for (i, j), row in zip(combinations(range(len(nets)), 2), rows, strict=True)}
    tree, ways = spanning_tree(len(nets), heights)
    grid = [{"a": names[i], "b": names[j], "value": 0.0 if i == j else ways[min(i, j), max(i, j)]} for i in range(len(nets)) for j in range(len(nets))]
    return {
        "pairs": Table(rows=rows, x="a", y="barrier", label="barriers of all pairs"),
        "minimax": Table(rows=grid, x="a", y="b", draw="heat", label="lowest barrier over all chains"),
        "networks": ends_table(ends),
        "tree": Table(rows=[{"a": names[i], "b": names[j], "barrier": heights[i, j]} for i, j in tree], x="a", y="barrier", label="tree of the lowest ways"),
    }


def spanning_tree(count: int, heights: dict[tuple[int, int], float]) -> tuple[list[tuple[int, int]], dict[tuple[int, int], float]]:
    """Edges of the minimum spanning tree (Kruskal 1956), and for every pair the highest edge on its way through it: the minimax barrier."""
    group, tree = list(range(count)), list[tuple[int, int]]()
    ways: dict[tuple[int, int], float] = {}
    for (i, j), height in sorted(heights.items(), key=lambda item: (item[1] if not math.isnan(item[1]) else math.inf)):
        if group[i] == group[j]:
            continue
        left, right = ([k for k in range(count) if group[k] == group[end]] for end in (i, j))
        ways |= {(min(a, b), max(a, b)): height for a in left for b in right}
        group = [group[i] if label == group[j] else label for label in group]
        tree.append((i, j))
    return tree, ways
