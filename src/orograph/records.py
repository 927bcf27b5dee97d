"""Records: what a probe found, with everything needed to trust and repeat it, kept in an append-only folder.

A folder holds `records.jsonl`, one JSON object per line, and `arrays/<id>.safetensors` with the tensors of one record; lines and files hold
their own SHA-256. The tensors are complete on disk before their line is written, and a line is one write to a file opened for appending, so several
processes may share a folder and a killed one leaves at most one unfinished line. A record that cannot be read costs the others nothing.
"""

from __future__ import annotations

import os
import re
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from torch import Tensor

from .arguments import Folder
from .checks import checked, refusal
from .durable import append_line, read_lines, read_tensors, remove_leftovers, sealed_line, write_tensors
from .encoding import Json, decode, encode
from .errors import OrographWarning, RecordError
from .record_text import record_text
from .results import Result, Status
from .scalars import scalars

if TYPE_CHECKING:
    import pandas

SCHEMA = 2  # of what is written; 1 had no checksums
READABLE = (1, 2)
ARRAY_ID = re.compile(r"[0-9a-f]{32}")
LINES, ARRAYS = "records.jsonl", "arrays"


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
        if not isinstance(name, str):
            raise refusal("Record", "name", name, f"the name of a result: {', '.join(self.results) or 'there is none'}.", TypeError)
        if name in self.results:
            return self.results[name]
        why = f"It is missing because {self.missing[name]}. " if name in self.missing else ""
        raise KeyError(f"the {self.probe} record has no result {name!r}. {why}It has: {', '.join(self.results) or 'none'}.")

    def __str__(self) -> str:
        return record_text(self)

    def __repr__(self) -> str:
        return f"<Record {self.probe} of {self.label or 'a network'!r}: {', '.join(self.results)}; {self.status}, {self.products} products>"


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
        if isinstance(index, slice):
            return Records(self.items[index])
        if isinstance(index, bool) or not isinstance(index, int):
            raise refusal("Records", "index", index, "a whole number or a slice.", TypeError)
        if not -len(self.items) <= index < len(self.items):
            raise IndexError(f"Records(index={index}) holds {len(self.items)} records: give a number from 0 to {len(self.items) - 1}.")
        return self.items[index]

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
def save_records(records: Record | Iterable[Record], folder: Folder, *, vectors: bool = False) -> None:
    """Append `records` to `folder`, which is made if need be. `vectors`: eigenvectors too (n numbers for each pair).

    OSError where there is no room or no permission: the records before are saved.
    """
    folder = Path(folder)
    (folder / ARRAYS).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder / ARRAYS)
    for record in [records] if isinstance(records, Record) else records:
        name, tensors = uuid.uuid4().hex, dict[str, Tensor]()
        line: dict[str, Json] = {f.name: encode(getattr(record, f.name), tensors, vectors=vectors, where=f.name) for f in fields(Record)}
        line |= {"schema": SCHEMA, "arrays": name if tensors else None}
        arrays = folder / ARRAYS / f"{name}.safetensors"
        if tensors:
            write_tensors(arrays, tensors, {"record": name})
        try:
            append_line(folder / LINES, sealed_line(line))
        except OSError:
            arrays.unlink(missing_ok=True)
            raise


@dataclass
class RecordKeeper:
    """Saves records in `folder` as they come. Where that fails, a warning says so once, and what is `unsaved` is tried again with the next one."""

    folder: Path
    unsaved: list[Record] = field(default_factory=list)
    problem: str = ""  # of the first failure

    def save(self, records: Iterable[Record] = ()) -> None:
        """Save these, and what could not be saved before."""
        self.unsaved += records
        try:
            while self.unsaved:
                save_records(self.unsaved[0], self.folder)
                del self.unsaved[0]
        except OSError as error:
            if not self.problem:
                warnings.warn(f"records cannot be saved in {self.folder} ({error.strerror or error}). Measuring goes on, and saving is tried again.", OrographWarning, stacklevel=2)
            self.problem = self.problem or error.strerror or str(error)

    @property
    def lost(self) -> str:
        """What is not on disk, in words; nothing where all is."""
        names = ", ".join(f"{record.probe} of {record.label}" for record in self.unsaved)
        return f"Not saved in {self.folder} ({self.problem}): {names}. Make room there, or give another folder, and run the same again." if names else ""


@checked
def load_records(folder: str | os.PathLike[str]) -> Records:
    """All records of `folder`, in the order in which they were saved.

    A record that cannot be read (an unfinished line, damage, a field of another type, arrays that are missing, a newer schema) is left out with a warning that
    names file, line and field. RecordError where not one can be read.
    """
    folder = Path(folder)
    path = folder / LINES
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}. Give the folder that save_records was given.")
    if not path.is_file():
        raise RecordError(f"{folder} holds no {LINES}, so nothing was saved there. Give the folder that save_records was given.")
    records, problems = [], []
    try:
        lines = list(read_lines(path))
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror or error}. Make it readable, or give another folder.") from error
    for line in lines:
        where = f"{path}, line {line.number}"
        try:
            if line.content is None:
                stopped = "unfinished (its writer was stopped)" if line.unfinished else f"damaged ({line.problem}). Restore the file, or remove that line"
                raise RecordError(f"{where} is {stopped}")
            records.append(_decode_record(line.content, folder, where, sealed=line.sealed))
        except RecordError as error:
            if line.content is None and line.unfinished:
                warnings.warn(f"{error}; skipped.", OrographWarning, stacklevel=2)
            else:
                problems.append(str(error))
    if problems and not records:
        raise RecordError(problems[0] + (f" (and {len(problems) - 1} more lines that cannot be read)" if len(problems) > 1 else ""))
    for problem in problems:
        warnings.warn(f"{problem} It is left out.", OrographWarning, stacklevel=2)
    if not path.stat().st_size:
        warnings.warn(f"{path} is empty: nothing was saved there, or it is damaged.", OrographWarning, stacklevel=2)
    return Records(records)


def _decode_record(content: dict[str, Json], folder: Path, where: str, *, sealed: bool) -> Record:
    schema, name = content.get("schema"), content.pop("arrays", None)
    if not isinstance(schema, int) or isinstance(schema, bool) or schema not in READABLE:
        newer = isinstance(schema, int) and schema > SCHEMA
        cure = "A newer version wrote it: pip install --upgrade orograph." if newer else "It is no record: remove that line."
        raise RecordError(f"{where} has schema {schema!r}, and this version of Orograph reads schema {' and '.join(map(str, READABLE))}. {cure}")
    if name is not None and not (isinstance(name, str) and ARRAY_ID.fullmatch(name)):
        raise RecordError(f"{where} is damaged: arrays is {name!r}, not 32 hexadecimal digits. Restore the file, or remove that line.")
    if schema > 1 and not sealed:
        raise RecordError(f"{where} is damaged: it holds no checksum. Restore the file, or remove that line.")
    arrays = folder / ARRAYS / f"{name}.safetensors"
    try:
        tensors, metadata = read_tensors(arrays, sealed=schema > 1) if name else ({}, {})
        if name and schema > 1 and metadata.get("record") != name:
            raise ValueError(f"it belongs to {metadata.get('record')}")
    except (OSError, ValueError) as error:
        raise RecordError(f"{where} needs {arrays}, which cannot be read ({error}). Restore that file, or remove the line.") from error
    part = ""
    try:
        decoded: dict[str, Any] = {}
        for field_name, value in content.items():
            part = f"{field_name}: "
            decoded[field_name] = decode(value, tensors)
        part = ""
        return Record(**decoded)  # checks the types of its fields, as every result does
    except (RecordError, TypeError, ValueError, KeyError, RecursionError) as error:
        raise RecordError(f"{where} is damaged: {part}{str(error).rstrip('.')}. Restore the file, or remove that line.") from error
