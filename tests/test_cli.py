"""The command line on real files: tasks, checkpoints, settings, and what each mistake is answered with."""

import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import orograph as og
from orograph.cli import app
from orograph.registry import _probes
from orograph.tasks import distinct_labels, import_task

EXAMPLE = Path(__file__).parent.parent / "examples" / "digits_task.py"
TASK = '''
import torch
from torch import nn
import orograph as og

x = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
y = torch.randint(0, 3, (30,), generator=torch.Generator().manual_seed(1))
torch.manual_seed(0)
net = nn.Linear(4, 3)


def objective():
    return og.Objective(net, nn.CrossEntropyLoss(), (x[:20], y[:20]))


def held_out():
    return objective().on((x[20:], y[20:]))


@og.probe
def probe_of_mine(subject, *, word: str = "none", number: float = 1.0, seed: int = 0) -> dict:
    """A probe in a task file."""
    loss = subject.held_out.value() if subject.held_out is not None else 0.0
    assert subject.held_out is None or torch.equal(subject.held_out.theta, subject.objective.theta)
    return {"value": og.Estimate(value=loss * number)}


@og.probe
def probe_of_many(subject, *points) -> dict:
    """A probe of any number of networks."""
    return {"count": og.Estimate(value=float(len(points)))}


@og.probe
def refuses_later(subject) -> dict:
    """A probe that fails at one checkpoint."""
    if subject.objective.label == "later":
        error = RuntimeError("the user's own words")
        error.add_note("the user's own note")
        raise error
    return {"value": og.Estimate(value=1.0)}
'''


@pytest.fixture(autouse=True)
def process_as_it_was(monkeypatch):
    """A task may stay in the process of a command, but not among the other tests."""
    probes, path, modules, threads = dict(_probes), list(sys.path), set(sys.modules), torch.get_num_threads()
    yield
    _probes.clear()
    _probes.update(probes)
    sys.path[:] = path
    torch.set_num_threads(threads)
    for name in set(sys.modules) - modules:
        if name.startswith("orograph_task_"):
            del sys.modules[name]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("task.py").write_text(TASK)
    for seed, name in enumerate(("first", "later", "third")):
        torch.manual_seed(seed)
        torch.save(torch.nn.Linear(4, 3).state_dict(), f"{name}.pt")
    return tmp_path


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def measured(*arguments):
    """Records of a run that must succeed."""
    result = run("measure", *arguments, "--out", "out")
    assert result.exit_code == 0, result.output
    return og.load_records("out/records"), result.output


def refused(*arguments):
    """The one message of a run that must be refused, without a traceback."""
    result = run("measure", *arguments)
    assert result.exit_code == 1 and "Traceback" not in result.output
    return result.stderr


# -- the example, as a user runs it ----------------------------------------------------------------------------------------------


def test_example_measures_two_checkpoints_side_by_side(here):
    trained = import_task(EXAMPLE).trained
    for seed in (0, 1):
        torch.save(trained(seed).state_dict(), f"seed-{seed}.pt")
    chosen = ["--weights", "seed-0.pt", "--weights", "seed-1.pt", "--set", "spectrum.k=4", "--set", "barrier.resolution=5", "--seed", "3"]
    records, output = measured(EXAMPLE, "gradient", "spectrum", "confidence", "barrier", *chosen)
    assert [(r.probe, r.label) for r in records] == [
        *((probe, "seed-0") for probe in ("gradient", "spectrum", "confidence")),
        *((probe, "seed-1") for probe in ("gradient", "spectrum", "confidence")),
        ("barrier", "seed-0 – seed-1"),
    ]
    spectrum, barrier = records[1], records[-1]
    assert len(spectrum["spectrum"].top.values) == 4 and spectrum.settings["seed"] == 3 and spectrum.provenance["weights"] == "seed-0.pt"
    assert "seed" not in barrier.settings and len(barrier["path"].x) >= 5 and "path_held_out" in barrier.results
    assert all(record.says in output for record in records)
    page = Path("out/report.html").read_text()
    assert all(words in page for words in ("seed-0", "seed-1", "seed-0 – seed-1", "Confidence")) and "out/report.html" in output


def test_the_installed_command_measures_the_own_point_in_a_process_of_its_own(here):
    command = [str(Path(sys.executable).with_name("orograph")), "measure", "task.py", "gradient", "probe_of_mine", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    records = og.load_records("orograph-report/records")
    assert [(r.probe, r.label, r.provenance["threads"]) for r in records] == [("gradient", "Linear", 1), ("probe_of_mine", "Linear", 1)]
    assert "gradient of Linear" in done.stdout and Path("orograph-report/report.html").exists()


# -- checkpoints -----------------------------------------------------------------------------------------------------------------


def test_numbers_are_those_of_measuring_by_hand(here):
    save_file(torch.load("later.pt"), "flat.safetensors")
    records, _ = measured("task.py", "gradient", "--weights", "first.pt", "--weights", "flat.safetensors")
    objective = import_task(Path("task.py")).objective()
    for record, file in zip(records, ("first.pt", "later.pt"), strict=True):
        assert record["norm"].value == og.measure(objective.at(file), "gradient")["norm"].value


def test_a_held_out_objective_follows_to_every_checkpoint(here):
    records, _ = measured("task.py", "probe_of_mine", "--weights", "first.pt", "--weights", "later.pt")
    held_out = import_task(Path("task.py")).held_out()
    assert [r["value"].value for r in records] == [held_out.at(file).value() for file in ("first.pt", "later.pt")]


def test_probes_of_any_number_of_networks_take_all_checkpoints_in_order(here):
    records, _ = measured("task.py", "probe_of_many", *(word for name in ("third", "first", "later") for word in ("--weights", f"{name}.pt")))
    assert records[0]["count"].value == 3 and records[0].label == "third – first – later"


def test_labels_of_like_stems_show_what_differs():
    assert distinct_labels([Path("a/last.pt"), Path("b/last.pt"), Path("b/best.pt")]) == ["a/last.pt", "b/last.pt", "best"]
    assert distinct_labels([Path("a/last.pt"), Path("a/last.safetensors")]) == ["last.pt", "last.safetensors"]
    assert distinct_labels([Path("r/1/m.pt"), Path("s/1/m.pt")]) == ["r/1/m.pt", "s/1/m.pt"] and distinct_labels([]) == []


def test_checkpoints_with_like_stems_are_told_apart_in_the_report(here):
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "last.pt").write_bytes(Path("first.pt").read_bytes())
    records, _ = measured("task.py", "gradient", "--weights", "a/last.pt", "--weights", "b/last.pt")
    assert [r.label for r in records] == ["a/last.pt", "b/last.pt"]


class Code:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return Path.write_text, (Path("executed"), "")


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_with_code_is_refused_and_runs_nothing(here, how):
    content = {"weight": torch.zeros(3, 4), "code": Code()}
    Path("evil.pt").write_bytes(pickle.dumps(content, protocol=2)) if how == "pickle" else torch.save(content, "evil.pt")
    message = refused("task.py", "gradient", "--weights", "evil.pt")
    assert "unpickling it could run any code" in message and "torch.save(model.state_dict()" in message and "save_file" in message
    assert not Path("executed").exists() and not Path("orograph-report").exists()


def test_unfit_checkpoints_are_refused_before_the_work(here):
    torch.save(torch.nn.Linear(4, 2).state_dict(), "other.pt")
    Path("torn.pt").write_bytes(Path("first.pt").read_bytes()[:300])
    Path("torn.safetensors").write_bytes(b"no weights")
    Path("empty.pt").write_bytes(b"")
    for file, words in {
        "other.pt": r"--weights other.pt: weight has shape \(2, 4\)",
        "torn.pt": "--weights torn.pt: ",
        "torn.safetensors": "--weights torn.safetensors: ",
        "empty.pt": "--weights empty.pt: ",
        "absent.pt": "--weights: there is no file .*absent.pt",
    }.items():
        assert re.search(words, refused("task.py", "gradient", "--weights", "first.pt", "--weights", file))
    assert "first.pt is given 2 times. Give every checkpoint once." in refused("task.py", "gradient", "--weights", "first.pt", "--weights", "./first.pt")
    assert not Path("orograph-report").exists()


# -- probes and settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_json_or_else_text(here):
    chosen = ["probe_of_mine.word=two words=1", "probe_of_mine.number=2.5"]
    records, _ = measured("task.py", "probe_of_mine", "probe_of_mine", *(word for text in chosen for word in ("--set", text)), "--seed", "7")
    assert [r.settings for r in records] == [{"word": "two words=1", "number": 2.5, "seed": 7}]


def test_a_seed_that_is_set_stands_above_the_common_one(here):
    records, _ = measured("task.py", "probe_of_mine", "--set", "probe_of_mine.seed=1", "--seed", "7")
    assert records[0].settings["seed"] == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "there is no probe 'nonsense'.*There are: .*probe_of_mine.*spectrum"),
        (["gradient", "--set", "nonsense.k=1"], "there is no probe 'nonsense'.*There are: "),
        (["gradient", "--set", "spectrum.k=1"], r"--set spectrum.k=1: spectrum is not among the probes asked for \(gradient\)"),
        (["spectrum", "--set", "spectrum.kk=1"], "spectrum has no setting 'kk'. It has: k, "),
        (["gradient", "--set", "gradient.k=1"], "gradient has no setting 'k'. It has: none"),
        (["spectrum", "--set", "k=1"], "not of the form PROBE.SETTING=VALUE"),
        (["spectrum", "--set", "spectrum.k"], "not of the form PROBE.SETTING=VALUE"),
        (["barrier"], r"barrier compares 2 networks \(a, b\): give --weights 2 times. It was given 0 times"),
        (["barrier", *(w for n in ("first", "later", "third") for w in ("--weights", f"{n}.pt"))], "give --weights 2 times. It was given 3 times"),
        (["barrier", "--weights", "first.pt", "--weights", "later.pt", "--set", "barrier.resolution=2"], r"barrier\(resolution=2\) needs a whole number from 3"),  # by the probe itself
    ],
)
def test_misuse_is_answered_with_one_message(here, arguments, words):
    assert re.search(words, refused("task.py", *arguments))


# -- the task --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, r"TASK is a Python file with objective\(\) in it, and there is no such file absent.py"),
        ("x = 1", r"absent.py has no objective\(\). Define it there"),
        ("def objective(): return 3", r"objective\(\) of the task returned a int. It must return an orograph.Objective"),
        (TASK.replace("return objective().on", "return "), r"held_out\(\) of the task returned a tuple"),
    ],
)
def test_unfit_tasks_are_refused(here, text, words):
    if text is not None:
        Path("absent.py").write_text(text)
    assert re.search(words, refused("absent.py", "gradient"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def objective():\n    return 1 / 0", "in objective.*ZeroDivisionError"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("def objective(:", "SyntaxError"),
        (TASK.replace("net, nn", "3, nn"), r"in objective.*TypeError: Objective\(model=3\) needs an nn\.Module"),
    ],
)
def test_errors_of_the_task_show_its_own_traceback_and_nothing_above_it(here, text, words):
    Path("broken.py").write_text(text)
    result = run("measure", "broken.py", "gradient")
    assert result.exit_code == 1 and re.search(words, result.stderr, re.DOTALL) and "broken.py" in result.stderr
    assert "cli.py" not in result.stderr and "tasks.py" not in result.stderr


def test_a_run_that_fails_keeps_the_points_that_it_has(here):
    result = run("measure", "task.py", "refuses_later", "--weights", "first.pt", "--weights", "later.pt", "--out", "out")
    assert result.exit_code == 1 and "in refuses_later" in result.stderr and "the user's own words" in result.stderr and "the user's own note" in result.stderr
    assert [r.label for r in og.load_records("out/records")] == ["first"]


def test_a_task_imports_what_lies_beside_it(here):
    Path("beside_the_task.py").write_text("WIDTH = 4")
    Path("task.py").write_text("from beside_the_task import WIDTH\n" + TASK)
    assert len(measured("task.py", "gradient")[0]) == 1


def test_a_task_is_handed_the_device_that_it_takes(here):
    assert len(measured("task.py", "gradient", "--device", "cpu")[0]) == 1
    assert re.search(r"made an objective on cpu. Let the task take it: def objective\(device=", refused("task.py", "gradient", "--device", "meta"))
    Path("task.py").write_text(TASK.replace("def objective()", "def objective(device='cpu')"))
    assert "Hand it on: Objective(..., device=device)." in refused("task.py", "gradient", "--device", "meta")
    assert "--device nonsense cannot be used here" in refused("task.py", "gradient", "--device", "nonsense")


# -- the folder ------------------------------------------------------------------------------------------------------------------


def test_a_second_run_adds_to_the_folder_and_to_its_report(here):
    measured("task.py", "gradient", "--weights", "first.pt")
    records, output = measured("task.py", "gradient", "--weights", "later.pt")
    assert [r.label for r in records] == ["first", "later"] and "with 1 of earlier runs" in output
    assert "first" in Path("out/report.html").read_text()


def test_a_damaged_folder_is_refused_before_the_work(here):
    Path("out/records").mkdir(parents=True)
    Path("out/records/records.jsonl").write_text("nonsense\n")
    assert "line 1 is damaged" in refused("task.py", "gradient", "--out", "out")


def test_report_and_list_commands(here):
    measured("task.py", "gradient")
    assert run("report", "out/records", "--out", "page.html").exit_code == 0 and Path("page.html").exists()
    result = run("report", "absent")
    assert result.exit_code == 1 and "There is no folder absent" in result.stderr and "Traceback" not in result.output
    assert "barrier (a, b): " in run("list").output


def test_describe_says_what_a_probe_measures_and_lists_its_settings():
    from typer.testing import CliRunner

    from orograph.cli import app, plain_formulas

    shown = CliRunner().invoke(app, ["describe", "pac_bayes"])
    assert shown.exit_code == 0 and "prior_samples" in shown.output and "27 values" in shown.output and "$" not in shown.output
    assert plain_formulas(r"$\\|\\nabla L\\|_2$".replace("\\\\", "\\")) == "|grad  L|_2"
    surface = CliRunner().invoke(app, ["describe", "surface"], env={"COLUMNS": "200"})
    assert "random, eigenvectors, gradient" in surface.output and "auto, frozen, reestimated" in surface.output and "enough" in surface.output
    wrong = CliRunner().invoke(app, ["describe", "sharpnes"])
    assert wrong.exit_code == 1


def test_figures_of_different_planes_have_names_of_their_own():
    from orograph import Record, Table
    from orograph.tasks import picture_stem

    def stem(probe="surface", networks=1, **settings):
        return picture_stem(Record(probe=probe, results={"points": Table(rows=[{"name": str(i)} for i in range(networks)])}, settings=settings))

    names = [stem(), stem(axes="eigenvectors"), stem(networks=3), stem(plane="<Plane>"), stem(probe="trajectory")]
    assert names == ["surface", "surface-eigenvectors", "surface-three-networks", "surface-plane", "trajectory"]


def test_a_file_of_something_else_is_named(tmp_path):
    import torch
    from torch import nn

    from orograph import Objective

    objective = Objective(nn.Linear(2, 2), nn.CrossEntropyLoss(), (torch.ones(4, 2), torch.tensor([0, 1, 0, 1])))
    for content in (b"hello, this is text", b"\x80\x02}q", b""):
        (tmp_path / "junk.pt").write_bytes(content)
        with pytest.raises(ValueError, match=r"junk.pt (is no weights file|holds)"):
            objective.point(tmp_path / "junk.pt")


def test_ctrl_c_says_what_is_kept(tmp_path):
    task = tmp_path / "task.py"
    task.write_text(
        "import time\nimport torch\nfrom torch import nn\nfrom orograph import Objective\n\n\nclass Slow(nn.Linear):\n    def forward(self, x):\n        time.sleep(0.03)\n        return super().forward(x)\n\n\n"
        "def objective():\n    torch.manual_seed(0)\n    return Objective(Slow(4, 3), nn.CrossEntropyLoss(), (torch.randn(30, 4), torch.arange(30) % 3))\n"
    )
    command = [str(Path(sys.executable).parent / "orograph"), "surface", str(task), "--out", str(tmp_path / "out"), "--set", "surface.tol=1e-9"]
    store = tmp_path / "out" / "samples.jsonl"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for _ in range(600):
            if store.exists() and store.read_text().count("\n") > 3:
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "samples are kept in" in output and "the same command goes on" in output and "Traceback" not in output


# -- a second run, and a run without room ---------------------------------------------------------------------------------------


CHECKPOINTS = [word for name in ("first", "later") for word in ("--weights", f"{name}.pt")]


def test_a_second_run_measures_nothing_that_is_saved(here):
    first, _ = measured("task.py", "gradient", "probe_of_mine", *CHECKPOINTS)
    again, output = measured("task.py", "gradient", "probe_of_mine", *CHECKPOINTS, "--threads", "1")
    assert [r.created for r in again] == [r.created for r in first] and len(again) == 4
    assert output.count("Saved already, not measured again") == 4 and "gradient of later" in output and "with 4 of earlier runs" in output


@pytest.mark.parametrize("change", ["weights", "setting", "seed", "data", "loss", "held out", "probe", "again"])
def test_a_second_run_measures_what_is_another_measurement(here, change):
    arguments = ["task.py", "probe_of_mine", "--weights", "first.pt"]
    measured(*arguments)
    text = Path("task.py").read_text()
    if change == "weights":
        torch.save({key: value * 1.001 for key, value in torch.load("first.pt").items()}, "first.pt")
    edits = {"data": ("torch.randn(30, 4", "1.001 * torch.randn(30, 4"), "loss": ("nn.CrossEntropyLoss()", "nn.CrossEntropyLoss(label_smoothing=0.001)"),
             "held out": ("x[20:], y[20:]", "x[21:], y[21:]"), "probe": ("loss * number", "loss * number * 1.0")}  # fmt: skip
    if change in edits:
        assert edits[change][0] in text
        Path("task.py").write_text(text.replace(*edits[change]))
    more = {"setting": ["--set", "probe_of_mine.number=2"], "seed": ["--seed", "1"], "again": ["--again"]}.get(change, [])
    records, output = measured(*arguments, *more)
    assert len(records) == 2 and "Saved already" not in output


def test_a_run_that_is_killed_goes_on_with_what_is_missing(here):
    text = Path("task.py").read_text().replace('if subject.objective.label == "later":', "if False:").replace("import torch\n", "import os, signal, torch\n", 1)
    killing = "    if subject.objective.label == 'later' and not os.path.exists('dead'):\n        open('dead', 'w').close()\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    Path("task.py").write_text(text.replace('    """A probe that fails at one checkpoint."""\n', '    """A probe that kills its process once."""\n' + killing))
    command = [str(Path(sys.executable).with_name("orograph")), "measure", "task.py", "gradient", "refuses_later", "probe_of_mine", *CHECKPOINTS, "--out", "out"]
    runs = [subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100, check=False) for _ in range(2)]
    assert [done.returncode for done in runs] == [-signal.SIGKILL, 0], runs[1].stderr
    assert runs[1].stdout.count("Saved already") == 4 and "Saved already, not measured again: gradient of later" in runs[1].stdout
    assert [(r.probe, r.label) for r in og.load_records("out/records")] == [(probe, label) for label in ("first", "later") for probe in ("gradient", "refuses_later", "probe_of_mine")]
    assert not [path for path in Path("out").rglob("*") if path.name.endswith((".partial", ".lock"))]


FULL = """
import errno, os, sys
import orograph.durable as durable
from orograph.cli import app
real = durable.append_line
def full(path, line):
    if os.path.exists("full"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    real(path, line)
import orograph.records
orograph.records.append_line = full
app()
"""


@pytest.mark.parametrize("freed", [True, False])
def test_a_full_disk_costs_no_measurement(here, freed):
    Path("full.py").write_text(FULL)
    Path("full").touch()
    text = Path("task.py").read_text().replace('if subject.objective.label == "later":', "if False:").replace("import torch\n", "import os, torch\n", 1)
    Path("task.py").write_text(text.replace('    """A probe that fails at one checkpoint."""\n', '    """A probe that makes room."""\n' + ("    os.remove('full')\n" if freed else "")))
    command = [sys.executable, "full.py", "measure", "task.py", "gradient", "refuses_later", "--out", "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=100, check=False)
    assert "records cannot be saved in out/records (No space left on device). Measuring goes on" in done.stderr and "gradient of Linear" in done.stdout
    assert done.stderr.count("cannot be saved") == 1 and (freed or not list(Path("out/records/arrays").iterdir()))
    if freed:
        assert done.returncode == 0 and len(og.load_records("out/records")) == 2
    else:
        assert done.returncode == 1 and "Not saved in out/records (No space left on device): gradient of Linear, refuses_later of Linear" in done.stderr
        assert Path("out/report.html").exists()
