"""Records: what a probe found, with everything needed to trust and repeat it, kept in an append-only folder.

A folder holds `records.jsonl`, one JSON object per line, and `arrays/<id>.safetensors` with the tensors of one record. The
tensors are complete on disk before their line is written, and a line is one write to a file opened for appending, so several
processes may share a folder and a killed one leaves at most one unfinished line.
"""

from __future__ import annotations

import json
import os
import uuid
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from .checks import checked
from .encoding import Json, decode, encode
from .errors import OrographWarning, RecordError
from .results import Curve, Result, Status, Table
from .scalars import cell_text, format_number, scalars

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
LINES, ARRAYS = "records.jsonl", "arrays"
MOST_LINES = 20  # of one result when printed
UNFINISHED = b"#unfinished"  # closes a line that a killed process left open, so that the next line starts on its own


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@checked
@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Record:
    """One measurement of one network by one probe.

    `results` by name · `says`: one plain sentence · `missing`: what could not be measured, and why · `settings`, `provenance`:
    JSON values · `tags`: what tells this record from its siblings · `products` spent for it, `reused` from shared work ·
    `label` of the network · `schema` of the file format · `created`: ISO time.
    """

    probe: str
    results: dict[str, Result]
    says: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str | int | float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    products: int = 0
    reused: int = 0
    seconds: float = 0.0
    status: Status = "converged"
    label: str = ""
    schema: int = SCHEMA
    created: str = field(default_factory=_now)

    def __getitem__(self, name: str) -> Result:
        if name in self.results:
            return self.results[name]
        why = f"It is missing because {self.missing[name]}. " if name in self.missing else ""
        raise KeyError(f"the {self.probe} record has no result {name!r}. {why}It has: {', '.join(self.results) or 'none'}.")

    def __str__(self) -> str:
        return _record_text(self)

    def __repr__(self) -> str:
        return f"<Record {self.probe} of {self.label or 'a network'!r}: {', '.join(self.results)}; {self.status}, {self.products} products>"


def _record_text(record: Record) -> str:
    """The text that `print(record)` shows."""
    title = f"{record.probe} of {record.label}" if record.label else record.probe
    lines = [f"{title}  ({record.status})"]
    lines += [f"  {record.says}"] if record.says else []
    for name, result in record.results.items():
        lines += ["", *_result_lines(name, result)]
    lines += [f"  {name} is missing: {why}" for name, why in record.missing.items()]
    reused = f" and {record.reused:,} reused" if record.reused else ""
    lines += ["", f"  {record.products:,} products{reused}, {record.seconds:.3g} s"]
    return "\n".join(lines)


def _result_lines(name: str, result: Result) -> list[str]:
    unit = f" ({result.unit})" if result.unit else ""
    if isinstance(result, Curve) and len(result.x):
        return [f"  {name}{unit}: {_curve_text(result)}"]
    if isinstance(result, Table):
        columns = [c for c in result.columns if not _in_a_bracket(c, result.columns)]
        header, body = columns, [[cell_text(row, column) for column in columns] for row in result.rows]
    else:
        numbers = scalars(result)
        header = []
        body = [[number.quantity, format_number(number.value, number.lower, number.upper), _unlike(number.status)] for number in numbers]
    if len(body) == 1 and not header:
        return ["  " + "  ".join([name, *body[0][1:]]).rstrip() + unit]
    hidden = [f"    ... {len(body) - MOST_LINES} more"] if len(body) > MOST_LINES else []
    shown = ([header] if header else []) + body[:MOST_LINES]
    return [f"  {name}{unit}", *(f"    {line}" for line in _aligned(shown)), *hidden]


def _curve_text(curve: Curve) -> str:
    """A curve in one line: its ends, its extremes, and over how many points."""
    x, y = curve.x.tolist(), curve.y.tolist()
    low, high = min(range(len(y)), key=y.__getitem__), max(range(len(y)), key=y.__getitem__)
    axis = (curve.xlabel or "x").split(":")[0].split(",")[0]
    return f"{y[0]:.4g} at {axis} = {x[0]:.3g}, {y[-1]:.4g} at {x[-1]:.3g}; least {y[low]:.4g} at {x[low]:.3g}, most {y[high]:.4g} at {x[high]:.3g} ({len(y)} points)"


def _in_a_bracket(column: str, columns: Sequence[str]) -> bool:
    """Whether a column is an error that the bracket behind a value shows already."""
    return (column in ("error", "lower", "upper") and "value" in columns) or (column.endswith("_sem") and column.removesuffix("_sem") in columns)


def _unlike(status: str | None) -> str:
    return "" if status in (None, "converged") else f"({status})"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with every column as wide as its widest cell."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))] if rows else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


@checked
@dataclass(frozen=True, eq=False, repr=False)
class Records:
    """An immutable sequence of records; a slice is again Records."""

    items: tuple[Record, ...] = ()

    def __init__(self, items: Iterable[Record] = ()) -> None:
        object.__setattr__(self, "items", tuple(items))

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> Record | Records:
        return Records(self.items[index]) if isinstance(index, slice) else self.items[index]

    def __str__(self) -> str:
        return "\n\n".join(str(record) for record in self.items)

    def __repr__(self) -> str:
        return f"<Records: {', '.join(dict.fromkeys(record.probe for record in self.items)) or 'empty'}; {len(self.items)} in all>"

    def to_frame(self) -> pandas.DataFrame:
        """One row per number: probe, label, result, quantity, value, lower, upper, status, products, then a column per tag."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("Records.to_frame() needs pandas: pip install 'orograph[frames]'.") from error
        columns = ["probe", "label", "result", "quantity", "value", "lower", "upper", "status", "products"]
        tags = [tag for tag in dict.fromkeys(tag for record in self.items for tag in record.tags) if tag not in columns]
        rows = [
            [record.probe, record.label, name, number.quantity, float(number.value), number.lower, number.upper,
             number.status or record.status, record.products, *(record.tags.get(tag) for tag in tags)]
            for record in self.items for name, result in record.results.items() for number in scalars(result)
        ]
        return pandas.DataFrame(rows, columns=columns + tags)


@checked
def save_records(records: Record | Iterable[Record], folder: str | os.PathLike[str], *, vectors: bool = False) -> None:
    """Append `records` to `folder`, which is made if need be. `vectors`: eigenvectors too (n numbers for each pair)."""
    folder = Path(folder)
    (folder / ARRAYS).mkdir(parents=True, exist_ok=True)
    for record in [records] if isinstance(records, Record) else records:
        name, tensors = uuid.uuid4().hex, dict[str, Tensor]()
        line: dict[str, Json] = {f.name: encode(getattr(record, f.name), tensors, vectors=vectors, where=f.name) for f in fields(Record)}
        line["arrays"] = name if tensors else None
        text = json.dumps(line, allow_nan=False, ensure_ascii=False)
        if tensors:
            _write_atomically(folder / ARRAYS / f"{name}.safetensors", safetensors.save(tensors))
        _append_line(folder / LINES, text.encode())


def _write_atomically(path: Path, content: bytes) -> None:
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def _append_line(path: Path, line: bytes) -> None:
    """One write, so that lines of several processes never mix; closes a line that a killed process left open."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
    try:
        size = os.fstat(descriptor).st_size
        os.lseek(descriptor, max(size - 1, 0), os.SEEK_SET)
        opening = UNFINISHED + b"\n" if size and os.read(descriptor, 1) != b"\n" else b""
        content = opening + line + b"\n"
        written = os.write(descriptor, content)
        if written != len(content):
            raise OSError(f"only {written} of {len(content)} bytes could be appended to {path}: is the disk full?")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@checked
def load_records(folder: str | os.PathLike[str]) -> Records:
    """All records of `folder`, in the order in which they were saved. An unfinished line is skipped with a warning."""
    folder = Path(folder)
    path = folder / LINES
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the folder that save_records was given.")
    if not path.is_file():
        raise RecordError(f"{folder} holds no {LINES}, so nothing was saved there. Give the folder that save_records was given.")
    records = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        text, torn = line.removesuffix(UNFINISHED), line.endswith(UNFINISHED) or number == len(lines)
        if not text.strip():
            continue
        try:
            content = json.loads(text)
        except ValueError as error:
            if not torn:
                raise RecordError(f"{path}, line {number} is damaged ({error}). Restore the file, or remove that line.") from error
            warnings.warn(f"{path}, line {number} is unfinished (its writer was stopped); skipped.", OrographWarning, stacklevel=2)
            continue
        records.append(_decode_record(content, folder, f"{path}, line {number}"))
    return Records(records)


def _decode_record(content: Json, folder: Path, where: str) -> Record:
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        newer = isinstance(schema, int) and schema > SCHEMA
        cure = "A newer version wrote it: pip install --upgrade orograph." if newer else "It is no record: remove that line."
        raise RecordError(f"{where} has schema {schema!r}, and this version of Orograph reads schema {SCHEMA}. {cure}")
    name = content.pop("arrays", None)
    arrays = folder / ARRAYS / f"{name}.safetensors"
    try:
        tensors = safetensors.load(arrays.read_bytes()) if name else {}
        return Record(**{name: decode(value, tensors) for name, value in content.items()})
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{where} needs {arrays}, which cannot be read ({error}). Restore that file, or remove the line.") from error
    except (RecordError, TypeError, ValueError, KeyError) as error:
        raise RecordError(f"{where} is damaged: {error}. Restore the file, or remove that line.") from error
