"""Says which sample of the families of cases a run has taken, so that it can be repeated."""

from .families import CHOICE


def pytest_report_header() -> str:
    return f"families of cases: OROGRAPH_FAMILIES={CHOICE} ('all' runs every case)"
