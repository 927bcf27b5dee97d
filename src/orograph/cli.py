"""The command line: `orograph demo | report FOLDER | list`."""

from __future__ import annotations

from pathlib import Path

import torch
import typer
from rich.console import Console
from rich.table import Table

from .demo import run_demo
from .errors import OrographError
from .records import load_records
from .registry import find_probe, list_probes
from .report import write_report

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Maps the loss landscape of real neural networks.")
console = Console()


@app.command()
def demo(
    out: Path = typer.Option(Path("demo-report"), help="Folder for records and report."),
    seed: int = typer.Option(0, help="Seed of initialisation and data order."),
    threads: int = typer.Option(0, help="Threads that torch may use; 0: all."),
) -> None:
    """Train one small network twice on handwritten digits, measure both, and write a report (under 2 minutes)."""
    if threads:
        torch.set_num_threads(threads)
    console.print("Training the same network with small and with large batches to the same loss, then measuring both.", highlight=False)
    result = run_demo(out, seed=seed)
    table = Table(title="What the landscape looks like around the two networks", show_lines=False, pad_edge=False)
    for column, style in (("quantity", "bold"), ("small batch", ""), ("large batch", ""), ("what it means", "dim")):
        table.add_column(column, style=style, no_wrap=column == "quantity")
    for row in result.table:
        table.add_row(*row)
    console.print(table)
    for record in result.records:
        if record.says:
            console.print(f"[bold]{record.label}[/], {record.probe}: {record.says}", highlight=False)
    console.print(f"Report: [bold]{result.report}[/]  (records in {out / 'records'}, {result.seconds:.0f} s)", highlight=False)


@app.command()
def report(folder: Path = typer.Argument(help="Folder of saved records."), out: Path = typer.Option(Path("report.html"), help="Page to write.")) -> None:
    """Write one self-contained page from saved records."""
    try:
        console.print(f"Report: [bold]{write_report(load_records(folder), out)}[/]", highlight=False)
    except (OrographError, OSError) as error:
        console.print(f"[red]{error}[/]", highlight=False)
        raise typer.Exit(1) from error


@app.command("list")
def list_command() -> None:
    """List the probes, with what each measures."""
    for name in list_probes():
        one = find_probe(name)
        takes = f" ({', '.join(one.points)})" if one.points else ""
        console.print(f"[bold]{name}[/]{takes}: {one.summary}", highlight=False)


def main() -> None:
    """Entry point of the `orograph` command."""
    app()
