"""Wrong options for every parameter of every command of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import typer
from torch import nn
from typer.testing import CliRunner

from orograph.cli import app

TASK = """import torch
from torch import nn
from orograph import Objective


def objective():
    torch.manual_seed(0)
    return Objective(nn.Linear(4, 3), nn.CrossEntropyLoss(), (torch.randn(30, 4), torch.arange(30) % 3))
"""
GOOD = {  # command -> right values of its arguments
    "demo": [], "measure": ["task.py", "gradient"], "connect": ["task.py", "a.pt", "b.pt"], "surface": ["task.py"], "report": ["records"], "list": [], "describe": ["noise"],
}  # fmt: skip
FILES = ["none.pt", ".", "a_file"]
WRONG = {  # parameter -> wrong values
    "threads": ["-1", "x", "1.5"], "seed": ["-1", "x", "1.5", "99999999999999999999999"], "device": ["cuda:99", "meta", "x", ""], "out": ["a_file", "a_file/x"], "weights": FILES,
    "settings": ["x", "k=1", "gradient.k=1", "surface.tol=NaN", "surface.tol=x", "connectivity.seed=1.5", "spectrum.k=0"], "task": ["none.py", ".", "a_file"], "probes": ["x"], "a": FILES, "b": FILES,
    "folder": ["none", ".", "a_file"], "name": ["x"],
}  # fmt: skip
SWITCHES = {"again", "help"}  # take no value


def commands() -> dict[str, typer.core.TyperCommand]:
    return typer.main.get_command(app).commands


def prepared(folder: Path) -> None:
    """The files that right arguments name."""
    (folder / "task.py").write_text(TASK)
    (folder / "a_file").write_text("x")
    for name in ("a.pt", "b.pt"):
        torch.save(nn.Linear(4, 3).state_dict(), folder / name)


def wrong_options() -> Iterator[tuple[str, str, list[str]]]:
    """(command, parameter, arguments with one wrong value)."""
    for name, command in commands().items():
        places = [p.name for p in command.params if p.param_type_name == "argument"]
        for parameter in command.params:
            for value in WRONG[parameter.name] if parameter.name not in SWITCHES else []:
                arguments = list(GOOD[name])
                if parameter.name in places:
                    arguments[places.index(parameter.name)] = value
                else:
                    arguments += [parameter.opts[0], value]
                yield name, parameter.name, [name, *arguments]
        yield name, "unknown option", [name, *GOOD[name], "--no-such-option"]


def unclear(arguments: list[str]) -> str:
    """How a command ended, where it was not refused in one message."""
    result = CliRunner().invoke(app, arguments)
    if result.exit_code == 0:
        return f"accepted: {' '.join(arguments)}"
    stray = result.exception is not None and not isinstance(result.exception, SystemExit)
    return f"{' '.join(arguments)}: {result.exception!r} {result.output[-300:]}" if stray or "Traceback" in result.output or not result.output.strip() else ""
