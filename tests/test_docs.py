"""What the pages say is so: their code runs, what they point at exists, and their tables are those of the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from .test_architecture import FILES, ROWS

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md"]
SECONDS = 60  # for all code of the README together


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def test_code_of_the_readme_runs(tmp_path):
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", read("README.md"), re.DOTALL | re.MULTILINE))
    command = [sys.executable, "-W", "error", "-c", code]
    threads = {"OMP_NUM_THREADS": "1"}  # small networks: a second thread would only wait for the processor
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | threads, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "build/readme/report.html").stat().st_size > 1e6


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_exist(page):
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", read(page)) if "://" not in target]
    assert [target for target in targets if not ((ROOT / page).parent / target).exists()] == []


def test_pictures_are_small():
    assert {path.name for path in (ROOT / "docs").glob("*.png") if path.stat().st_size > 400_000} == set()


@pytest.mark.parametrize("page", PAGES)
def test_make_targets_exist(page):
    wanted = " ".join(re.findall(r"(?:`|^)make ([a-z0-9 -]+)", read(page), re.MULTILINE)).split()
    targets = re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE)
    assert set(wanted) <= set(targets)


def test_readme_names_every_make_target_of_its_list():
    assert [t for t in ("demo", "test", "test-full", "lint", "types", "bench", "docs", "evidence-1") if f"`make {t}`" not in read("README.md")] == []


def test_readme_maps_every_file():
    rooms = {name.split(".")[0] + "/" if "." in name or FILES[name].name == "__init__.py" else f"{name}.py" for name in FILES if name}
    assert {room for room in rooms if f"| `{room}` |" not in read("README.md")} == set()


def test_architecture_shows_the_rows_that_the_imports_are_tested_by():
    written = re.findall(r"^\| \d+ \| (.*) \|$", read("docs/architecture.md"), re.MULTILINE)
    assert [re.findall(r"`([\w.]+)`", row) for row in written] == ROWS


def test_versions_agree():
    version = re.search(r'^version = "(.+)"$', read("pyproject.toml"), re.MULTILINE)[1]
    assert re.search(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)[1] == version
    assert re.search(rf"^## {re.escape(version)}\b", read("CHANGELOG.md"), re.MULTILINE)
