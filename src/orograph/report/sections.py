"""What the page shows, as plain values for its template: networks, key numbers, and a section for each probe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..records import Record, Records
from ..results import Curve, Estimate, Point, Result, Spectrum, Table, unequal_losses
from ..scalars import Scalar, is_number, scalars
from .blocks import MOST_COLUMNS, make_block, number_cell, quantity_title
from .theme import DASHES, PALETTE, Series, sentence, spread

MOST_CARDS = 8  # records of one probe that are shown unfolded
LATEST_CARDS = 3  # and of a series over a tag, whose figures show the rest
FACTS = {"version": "Orograph", "torch": "PyTorch", "device": "device", "dtype": "precision", "engine": "engine"}
MEANINGS = {
    "converged": "reached its tolerance",
    "noise-limited": "stopped at the noise floor of the arithmetic",
    "budget-limited": "stopped at its budget of products, so intervals are wider than asked for",
}


@dataclass(frozen=True)
class Shown:
    """A record with the name that it has all over the page, and the colour of its group; `at`, `axis`, `group` as in Series."""

    record: Record
    name: str
    colour: str
    at: float | None
    axis: str
    group: str


def page_content(records: Records) -> dict[str, Any]:
    """Everything that the template shows. Figures are numbered in the order of the page."""
    shown = _shown(records)
    probes = list(dict.fromkeys(s.record.probe for s in shown))
    figures: list[str] = []
    sections = [_section(probe, [s for s in shown if s.record.probe == probe], figures) for probe in probes]
    statuses = Counter(record.status for record in records)
    created = sorted(record.created for record in records)
    facts = [(title, _distinct(records, key)) for key, title in FACTS.items()]
    facts += [("seeds", _distinct(records, "seed")), ("status", ", ".join(f"{n} {status}" for status, n in statuses.items()))]
    facts += [("products", f"{sum(r.products for r in records):,}"), ("compute time", seconds_text(sum(r.seconds for r in records)))]
    return {
        "title": "Loss landscape report", "networks": _networks(shown), "sections": sections, "figures": figures, "meanings": MEANINGS,
        "facts": [(title, value) for title, value in facts if value], "count": len(records), "summary": _summary(shown),
        "period": " to ".join(dict.fromkeys([created[0][:10], created[-1][:10]])) if created else "",
    }


def _networks(shown: Sequence[Shown]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((s.group, s.colour) for s in shown))


def _distinct(records: Records, key: str) -> str:
    return ", ".join(dict.fromkeys(str(r.provenance[key]) for r in records if r.provenance.get(key) is not None))


def _shown(records: Records) -> list[Shown]:
    """Names from the label and the tags that vary; the same measurement made twice is numbered."""
    tags = list(dict.fromkeys(tag for record in records for tag in record.tags))
    varying = [tag for tag in tags if len({record.tags.get(tag) for record in records if tag in record.tags}) > 1]
    several = len({record.label for record in records}) > 1
    numeric = [tag for tag in varying if all(is_number(record.tags[tag]) for record in records if tag in record.tags)]
    axis = numeric[0] if len(numeric) == 1 else ""
    seen: dict[tuple[str, str], int] = {}
    named = []
    for record in records:
        own = {tag: f"{tag} {_tag_text(record.tags[tag])}" for tag in varying if tag in record.tags}
        label = record.label or "network"
        parts = ([label] if several or not own else []) + list(own.values())
        name = " · ".join(parts)
        count = seen[record.probe, name] = seen.get((record.probe, name), 0) + 1
        name = name if count == 1 else f"{name} ({count})"
        at = float(record.tags[axis]) if axis in record.tags else None
        others = [text for tag, text in own.items() if tag != axis]
        named.append((record, name, at, name if at is None else " · ".join(([label] if several or not others else []) + others)))
    groups = list(dict.fromkeys(group for *_, group in named))
    colours = dict(zip(groups, PALETTE if len(groups) <= len(PALETTE) else spread(len(groups)), strict=False))
    return [Shown(record, name, colours[group], at, axis, group) for record, name, at, group in named]


def _tag_text(value: str | int | float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def seconds_text(seconds: float) -> str:
    """A duration in the unit that a reader would choose."""
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _summary(shown: Sequence[Shown]) -> dict[str, Any]:
    """Key numbers: a row for each quantity, a column for each network, which shows its latest measurement."""
    rows: dict[tuple[str, str], dict[str, dict[str, str]]] = {}
    for s in shown:
        for name, result in s.record.results.items():
            for number in _key_numbers(name, result):
                rows.setdefault((s.record.probe, number.quantity), {})[s.group] = number_cell(replace(number, status=number.status or s.record.status))
    columns = [column for column in _networks(shown) if any(column[0] in cells for cells in rows.values())]
    kept = columns[-MOST_COLUMNS:]
    table = [(probe, quantity, [cells.get(name) for name, _ in kept]) for (probe, quantity), cells in rows.items()]
    return {"columns": kept, "rows": table, "hidden": len(columns) - len(kept), "unequal": _unequal(shown), "axis": next((s.axis for s in shown if s.at is not None), "")}


def _unequal(shown: Sequence[Shown]) -> str:
    """What to know before networks are compared by their curvature: that their losses differ."""
    losses: dict[Any, dict[str, float]] = {}
    for s in shown:
        if is_number(s.record.provenance.get("loss")):
            data = s.record.provenance.get("fingerprints", {}).get("data")
            losses.setdefault(data, {})[s.group] = float(s.record.provenance["loss"])
    found = [text for text in map(unequal_losses, losses.values()) if text]
    note = " Curvature and sharpness change with the loss, so a difference in them says nothing yet."
    return "".join(f"{text}{note}" for text in found[:1])


def _key_numbers(name: str, result: Result) -> list[Scalar]:
    if isinstance(result, Estimate) and not isinstance(result.value, Tensor):
        return [replace(number, quantity=result.label or quantity_title(name)) for number in scalars(result)]
    if isinstance(result, Spectrum):
        ends = [("largest eigenvalue λₘₐₓ", result.top, max), ("smallest eigenvalue λₘᵢₙ", result.bottom, min)]
        found = [
            replace(best(scalars(pairs), key=lambda number: number.value), quantity=title, unit=result.unit)
            for title, pairs, best in ends if len(pairs.values)
        ]
        return found + [replace(scalars(e)[0], quantity=title) for title, e in (("trace", result.trace), ("share of negative eigenvalues", result.negative_mass))]
    return []


def _section(probe: str, shown: Sequence[Shown], figures: list[str]) -> dict[str, Any]:
    number = len(figures)
    cards = [_card(s) for s in shown]
    folded = len(cards) - LATEST_CARDS if len(cards) > MOST_CARDS and shown[-1].at is not None else 0
    blocks = [make_block(title, kind, series, figures) for title, kind, series in _groups(shown)]
    narrow = [block for block in blocks if not block["wide"]]
    if len(narrow) % 2:
        narrow[-1]["wide"] = True  # no half-empty row
    title = {"pac_bayes": "PAC-Bayes"}.get(probe, sentence(probe.replace("_", " ")))
    unfolded = cards[folded : folded + MOST_CARDS]
    return {"id": f"probe-{number}", "title": title, "cards": unfolded, "folded": [card for card in cards if card not in unfolded], "blocks": blocks}


def _card(s: Shown) -> dict[str, Any]:
    record = s.record
    reused = f", {record.reused:,} reused" if record.reused else ""
    details = {"settings": record.settings, "tags": record.tags, "provenance": {**record.provenance, "created": record.created}}
    return {
        "name": s.name, "colour": s.colour, "status": record.status, "says": record.says, "missing": list(record.missing.items()),
        "cost": f"{record.products:,} products{reused}, {seconds_text(record.seconds)}",
        "details": [(title, [(key, _json_text(value)) for key, value in values.items()]) for title, values in details.items() if values],
    }


def _json_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _groups(shown: Sequence[Shown]) -> list[tuple[str, type, list[Series]]]:
    """Results that share a figure: of one name and kind, or curves over the same axes."""
    groups: dict[tuple[Any, ...], list[tuple[str, Series]]] = {}
    over_tag = len({s.group for s in shown}) < len(shown)  # one network at several values of a tag: colour shows the order
    colours = spread(len(shown)) if over_tag else [s.colour for s in shown]
    for s, colour in zip(shown, colours, strict=True):
        marks = [row for r in s.record.results.values() if isinstance(r, Table) and {"s", "t"} <= set(r.columns) and {"name", "step"} & set(r.columns) for row in r.rows]  # networks, no minima
        for name, result in s.record.results.items():
            together = isinstance(result, Curve) and result.ylabel
            key = (Curve, result.xlabel, result.ylabel, result.unit) if together and isinstance(result, Curve) else (type(result), name)
            series = Series(s.name, result, s.colour if isinstance(result, Estimate) else colour, at=s.at, axis=s.axis, group=s.group, marks=marks)
            groups.setdefault(key, []).append((name, series))
    return [_named_group(key[0], members) for key, members in groups.items()]


def _named_group(kind: type, members: list[tuple[str, Series]]) -> tuple[str, type, list[Series]]:
    names = list(dict.fromkeys(name for name, _ in members))
    label = members[0][1].result.label
    if len(names) == 1:
        return label if label and not isinstance(members[0][1].result, Point) else names[0].replace("_", " "), kind, [s for _, s in members]
    single = len({s.name for _, s in members}) == 1  # several curves of one network: colour tells them apart
    series = []
    for name, s in members:
        i, title = names.index(name), s.result.label or name.replace("_", " ")
        changes: dict[str, Any] = {"name": title, "colour": PALETTE[i % len(PALETTE)]} if single else {"name": f"{s.name} · {title}"}
        series.append(replace(s, **changes, dash="solid" if single else DASHES[i % len(DASHES)]))
    return members[0][1].result.ylabel or ", ".join(names), kind, series
