"""The page: saved records in, one HTML file out."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from ..arguments import File
from ..checks import checked
from ..durable import remove_leftovers, write_atomically
from ..records import Record, Records, load_records


@checked
def write_report(records_or_folder: Records | Record | Iterable[Record] | str | os.PathLike[str], path: File) -> Path:
    """Write one self-contained HTML file about saved records and return its path.

    A pure function of the records: no model, no data, no network. The same records give the same bytes.
    """
    if isinstance(records_or_folder, (str, os.PathLike)):
        records = load_records(records_or_folder)
    else:
        records = Records([records_or_folder] if isinstance(records_or_folder, Record) else records_or_folder)
    text = _render(records)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent)
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    return path


def _render(records: Records) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError("write_report() needs plotly and jinja2: pip install 'orograph[report]'.") from error
    from .sections import page_content

    content = page_content(records)
    template = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    script = get_plotlyjs() if content["figures"] else ""
    return environment.from_string(template).render(content, plotly=script)
