"""Progress of a long job: a bar with an ETA on a terminal, a callback where one is given, silence elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

Report = Callable[[int, int, str], None]  # (done, expected total, note)
Progress = bool | Report | None  # None: a bar only on a terminal; False: never; True: always; or a callback


@contextmanager
def progress_bar(progress: Progress, title: str, unit: str = "product") -> Iterator[Report]:
    """Yield `report(done, total, note)`; the total may change as the job learns how long it will take."""
    if callable(progress):
        yield progress
        return
    if progress is False or (progress is None and not sys.stderr.isatty()):
        yield lambda done, total, note: None
        return
    with tqdm(desc=title, unit=unit, leave=False, dynamic_ncols=True) as bar:

        def report(done: int, total: int, note: str) -> None:
            bar.total = max(total, done)
            bar.set_postfix_str(note, refresh=False)
            bar.update(done - bar.n)

        yield report
