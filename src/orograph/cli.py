"""The command line: `orograph demo | measure TASK PROBE... | connect TASK A B | surface TASK | report FOLDER | list | describe PROBE`."""

from __future__ import annotations

import inspect
import re
import sysconfig
import traceback
import warnings
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Literal, get_args, get_origin, get_type_hints

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .arguments import MOST_WHOLE
from .demo import run_demo
from .errors import OrographError, OrographWarning
from .objective import Objective
from .records import LINES, Record, RecordKeeper, Records, load_records
from .registry import find_probe, list_probes
from .report import write_report
from .results import Point, Surface
from .tasks import (
    Job,
    check_device,
    check_files,
    check_probes,
    count_lines,
    import_task,
    make_objective,
    picture_stem,
    read_settings,
    run_job,
    save_pictures,
    save_weights,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Maps the loss landscape of real neural networks.")
console = Console()
PACKAGE = Path(__file__).resolve().parent
LIBRARIES = (PACKAGE, *(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "purelib", "platlib")))


@app.command()
def demo(
    out: Path = typer.Option(Path("demo-report"), help="Folder for records and report."),
    seed: int = typer.Option(0, min=0, max=MOST_WHOLE, help="Seed of initialisation and data order."),
    threads: int = typer.Option(0, min=0, help="Threads that torch may use; 0: all."),
) -> None:
    """Train one small network twice on handwritten digits, measure both, and write a report (under 2 minutes)."""
    if threads:
        torch.set_num_threads(threads)
    console.print("Training the same network with small and with large batches to the same loss, then measuring both.", highlight=False)
    try:
        result = run_demo(out, seed=seed)
    except Exception as error:
        raise _failed(error) from error
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
def measure(
    task: Path = typer.Argument(help="Python file with objective(), and optionally held_out(); its own @probe functions are found."),
    probes: list[str] = typer.Argument(help="Names of probes; `orograph list` shows them."),
    weights: list[Path] = typer.Option([], help="Checkpoint to measure (safetensors, or a state dict that torch.save wrote); repeatable."),
    settings: list[str] = typer.Option([], "--set", help="A setting of a probe, such as spectrum.k=20; repeatable.", metavar="PROBE.KEY=VALUE"),
    out: Path = typer.Option(Path("orograph-report"), help="Folder for records and report."),
    device: str | None = typer.Option(None, help="Handed to objective(device=...)."),
    threads: int = typer.Option(0, min=0, help="Threads that torch may use; 0: all."),
    seed: int | None = typer.Option(None, min=0, max=MOST_WHOLE, help="Seed of every probe that has one."),
    again: bool = typer.Option(False, "--again", help="Measure what the folder holds already, too."),
) -> None:
    """Measure a network, or several checkpoints side by side, and write a report."""
    try:
        _measure(task, tuple(dict.fromkeys(probes)), weights, settings, out, device, threads, seed, again)
    except Exception as error:
        raise _failed(error) from error


def _measure(
    task: Path, probes: tuple[str, ...], weights: list[Path], settings: list[str], out: Path, device: str | None, threads: int, seed: int | None, again: bool
) -> None:
    if threads:
        torch.set_num_threads(threads)
    if device is not None:
        check_device(device)
    check_files(weights)
    keeper = RecordKeeper(out / "records")
    earlier = load_records(keeper.folder) if (keeper.folder / LINES).exists() else Records()  # an unreadable folder shows before the work, not after it
    saved = {} if again else {record.provenance["job"]: record for record in earlier if "job" in record.provenance}
    module = import_task(task)
    check_probes(probes, len(weights))
    chosen = read_settings(settings, probes, seed)
    objective = make_objective(module, "objective", device)
    held_out = make_objective(module, "held_out", device) if "held_out" in vars(module) else None
    drawn: Counter[str] = Counter()
    fresh: list[Record] = []
    for record, new in run_job(Job(objective, held_out, probes, chosen, tuple(weights)), saved):
        if new:
            fresh.append(record)
            keeper.save([record])
        _save_beside(objective, record, out, drawn)
        if new:
            console.print(str(record), markup=False, highlight=False, soft_wrap=True, end="\n\n")
        else:
            console.print(f"Saved already, not measured again: {record.probe} of {record.label} (--again measures it).", markup=False, highlight=False, soft_wrap=True)
    keeper.save()
    lost = keeper.lost
    try:
        page = write_report(Records([*earlier, *fresh]), out / "report.html")
        also = f", with {len(earlier)} of earlier runs" if earlier else ""
        console.print(f"Report: [bold]{page}[/]  (records in {keeper.folder}{also})", highlight=False, soft_wrap=True)
    except OSError as error:
        lost += f"{' ' if lost else ''}The report cannot be written to {out / 'report.html'} ({error.strerror or error})."
    if lost:
        raise OSError(lost)


def _save_beside(objective: Objective, record: Record, out: Path, drawn: Counter[str]) -> None:
    """The pictures of a surface and the merged network, in files of their own. A full disk costs these files, not the measurement."""
    try:
        if isinstance(record.results.get("surface"), Surface):
            stem = picture_stem(record)
            drawn[stem] += 1
            files = save_pictures(record, out, stem if drawn[stem] == 1 else f"{stem}-{drawn[stem]}")
            console.print(f"Surface: {', '.join(map(str, files))}", highlight=False, soft_wrap=True)
        if isinstance(merged := record.results.get("merged"), Point):
            save_weights(objective.state_dict(merged), out / "merged.safetensors")
            console.print(f"Merged network: [bold]{out / 'merged.safetensors'}[/]", highlight=False, soft_wrap=True)
    except OSError as error:
        warnings.warn(f"files of {record.probe} of {record.label} cannot be written in {out} ({error.strerror or error}). Run the same again where there is room.", OrographWarning, stacklevel=2)


@app.command()
def connect(
    task: Path = typer.Argument(help="Python file with objective(), and optionally held_out()."),
    a: Path = typer.Argument(help="Checkpoint of the first network."),
    b: Path = typer.Argument(help="Checkpoint of the second network."),
    settings: list[str] = typer.Option([], "--set", help="A setting of the probe, such as connectivity.curve_epochs=50; repeatable.", metavar="PROBE.KEY=VALUE"),
    out: Path = typer.Option(Path("orograph-report"), help="Folder for records, report and the merged network."),
    device: str | None = typer.Option(None, help="Handed to objective(device=...)."),
    threads: int = typer.Option(0, min=0, help="Threads that torch may use; 0: all."),
    seed: int | None = typer.Option(None, min=0, max=MOST_WHOLE, help="Seed of every draw."),
    again: bool = typer.Option(False, "--again", help="Measure what the folder holds already, too."),
) -> None:
    """Say whether two checkpoints are connected, and along which path; write their merged network and a report."""
    try:
        _measure(task, ("connectivity",), [a, b], settings, out, device, threads, seed, again)
    except Exception as error:
        raise _failed(error) from error


@app.command()
def surface(
    task: Path = typer.Argument(help="Python file with objective(), and optionally held_out()."),
    weights: list[Path] = typer.Option([], help="One checkpoint to stand at, or three to draw the plane through; repeatable."),
    settings: list[str] = typer.Option([], "--set", help="A setting of the probe, such as surface.axes=eigenvectors; repeatable.", metavar="PROBE.KEY=VALUE"),
    out: Path = typer.Option(Path("orograph-report"), help="Folder for records, report, samples, and the surface as .npz, .csv, .vtk, and (with matplotlib) .png and .svg."),
    device: str | None = typer.Option(None, help="Handed to objective(device=...)."),
    threads: int = typer.Option(0, min=0, help="Threads that torch may use; 0: all."),
    seed: int | None = typer.Option(None, min=0, max=MOST_WHOLE, help="Seed of the directions."),
    again: bool = typer.Option(False, "--again", help="Measure what the folder holds already, too."),
) -> None:
    """Draw the loss over a plane; run again, a killed job goes on from its samples."""
    try:
        if not any(text.startswith("surface.store=") for text in settings):
            settings = [*settings, f"surface.store={out / 'samples.jsonl'}"]
        store = next(text for text in settings if text.startswith("surface.store=")).partition("=")[2]
        if (kept := count_lines(Path(store))) > 0:
            console.print(f"Going on from {store}, which holds {kept} samples (of this surface, or of others).", highlight=False, soft_wrap=True)
        _measure(task, ("surface",), weights, settings, out, device, threads, seed, again)
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. {count_lines(Path(store))} samples are kept in {store}: the same command goes on from there.", highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    except Exception as error:
        raise _failed(error) from error


@app.command()
def report(folder: Path = typer.Argument(help="Folder of saved records."), out: Path = typer.Option(Path("report.html"), help="Page to write.")) -> None:
    """Write one self-contained page from saved records."""
    try:
        page = write_report(load_records(folder), out)
    except Exception as error:
        raise _failed(error) from error
    console.print(f"Report: [bold]{page}[/]", highlight=False, soft_wrap=True)


@app.command("list")
def list_command() -> None:
    """List the probes, with what each measures."""
    for name in list_probes():
        one = find_probe(name)
        takes = f" ({', '.join(one.points)})" if one.points else ""
        console.print(f"[bold]{name}[/]{escape(takes)}: {escape(plain_formulas(one.summary))}", highlight=False, soft_wrap=True)
    console.print("orograph describe NAME says more of one, and lists its settings.", style="dim")


@app.command()
def describe(name: str = typer.Argument(help="Name of a probe.")) -> None:
    """Say what a probe measures, what it costs, and which settings it has."""
    try:
        one = find_probe(name)
    except Exception as error:
        raise _failed(error) from error
    console.print(plain_formulas(inspect.getdoc(one.function) or ""), markup=False, highlight=False)
    table = Table(title=f"settings of {name}", show_lines=False, pad_edge=False)
    table.add_column("setting", style="bold", no_wrap=True)
    table.add_column("default")
    table.add_column("choices")
    choices = get_type_hints(one.function)
    for setting, default in one.settings.items():
        table.add_row(setting, shortened(str(default)), ", ".join(literals(choices.get(setting))))
    console.print(table)


def plain_formulas(text: str) -> str:
    """LaTeX as plain characters, near enough to be read in a terminal; a paragraph is one line, and so is each setting or result in it."""
    text = re.sub(r"(?<!\n)\n(?!\n)", " ", text)
    text = re.sub(r"\\t?frac\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}\{([^{}]*)\}", r"\1/\2", text).replace(" · ", "\n- ")
    for command, character in (("\\|", "|"), ("\\,", " "), ("\\tfrac12", "1/2"), ("\\nabla", "grad "), ("\\le", "<="), ("\\odot", "*"), ("\\top", "T"), ("$", "")):
        text = text.replace(command, character)
    return re.sub(r"\\(?:operatorname|mathbb|sqrt|tfrac|frac)?\{?([A-Za-z]*)\}?", r"\1", text)


def literals(hint: object) -> list[str]:
    """The words that a setting may be."""
    if get_origin(hint) is Literal:
        return [str(choice) for choice in get_args(hint)]
    return [word for part in get_args(hint) for word in literals(part)]


def shortened(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:30]} ... ({text.count(',') + 1} values)"


def _failed(error: Exception) -> typer.Exit:
    """Say what went wrong: one message for a mistake in the call, the traceback from the user's own code on, where that took part."""
    begin = error.__traceback__
    while begin is not None and not _is_own(begin):
        begin = begin.tb_next
    deepest = traceback.extract_tb(error.__traceback__)[-1].filename
    refused = isinstance(error, ValueError | TypeError) and Path(deepest).resolve().is_relative_to(PACKAGE)
    if begin is None and (refused or isinstance(error, OrographError | OSError | ImportError)):
        Console(stderr=True).print(str(error), style="red", markup=False, highlight=False, soft_wrap=True)
    else:
        shown = begin if begin is not None or isinstance(error, SyntaxError) else error.__traceback__
        Console(stderr=True).print("".join(traceback.format_exception(type(error), error, shown)), markup=False, highlight=False, soft_wrap=True, end="")
    return typer.Exit(1)


def _is_own(frame: TracebackType) -> bool:
    """Whether a frame is of the user's own code: neither Orograph, nor Python, nor an installed package."""
    name = frame.tb_frame.f_code.co_filename
    return not name.startswith("<") and not any(Path(name).resolve().is_relative_to(library) for library in LIBRARIES)


def main() -> None:
    """Entry point of the `orograph` command."""
    app()
