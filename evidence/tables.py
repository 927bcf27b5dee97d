"""How evidence is shown: a table of claims, each with what was measured, its bar, pass or fail."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

Row = tuple[str, str, str, bool]  # claim, measured, bar, passed


def holds(check: Callable[[], object]) -> bool:
    """Whether a test passes; the tests raise when it does not."""
    try:
        check()
    except Exception as error:  # a test that breaks has not held either
        print(f"{getattr(check, 'func', check)}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
        return False
    return True


def show(title: str, sections: Sequence[Callable[[], list[Row]]]) -> None:
    """Measure every section, print the table, and exit with 1 if a row has failed."""
    console = Console(width=None if sys.stdout.isatty() else 170)
    table = Table("claim", "measured", "bar", "", title=title)
    failed = 0
    for section in sections:
        began = time.perf_counter()
        for claim, measured, bar, passed in section():
            table.add_row(claim, measured, bar, "pass" if passed else "[red]FAIL[/]")
            failed += not passed
        name = getattr(section, "__name__", "trace intervals").replace("_", " ")
        console.print(f"[dim]{name}: {time.perf_counter() - began:.0f} s[/]", highlight=False)
    console.print(table)
    sys.exit(failed > 0)
