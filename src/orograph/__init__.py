"""Orograph maps the loss landscape of real neural networks: certified curvature, with its error and its cost.

>>> objective = Objective(model, nn.CrossEntropyLoss(), (inputs, targets))
>>> record = measure(objective, "spectrum")
>>> print(record)
"""

from . import probes as _probes  # noqa: F401  (registers the built-in probes)
from .alignment import Alignment, align
from .bands import elastic_band
from .curvature import block, fisher, ggn, hessian, preconditioned
from .curves import fit_path
from .errors import (
    NotDeterministic,
    NotDifferentiable,
    OrographError,
    OrographWarning,
    OutOfBudget,
    PreflightFailed,
    RecordError,
)
from .exports import load_surface, save_surface
from .linalg.density import spectral_density
from .linalg.eigen import eigenpairs
from .linalg.operator import LinearOperator
from .linalg.spectra import spectrum
from .linalg.traces import diagonal, trace
from .objective import Objective
from .optimizers import Edge, edge, preconditioner
from .paths import Bezier, Line, PolyChain
from .planes import Plane
from .records import Record, Records, load_records, save_records
from .registry import connect, list_probes, measure, measure_all, probe
from .report import write_report
from .results import Curve, Density, Eigenpairs, Estimate, Point, Result, Spectrum, Surface, Table
from .subject import Subject
from .subsets import data_error

__all__ = [
    "Alignment",
    "Bezier",
    "Curve",
    "Density",
    "Edge",
    "Eigenpairs",
    "Estimate",
    "Line",
    "LinearOperator",
    "NotDeterministic",
    "NotDifferentiable",
    "Objective",
    "OrographError",
    "OrographWarning",
    "OutOfBudget",
    "Plane",
    "Point",
    "PolyChain",
    "PreflightFailed",
    "Record",
    "RecordError",
    "Records",
    "Result",
    "Spectrum",
    "Subject",
    "Surface",
    "Table",
    "align",
    "block",
    "connect",
    "data_error",
    "diagonal",
    "edge",
    "eigenpairs",
    "elastic_band",
    "fisher",
    "fit_path",
    "ggn",
    "hessian",
    "list_probes",
    "load_records",
    "load_surface",
    "measure",
    "measure_all",
    "preconditioned",
    "preconditioner",
    "probe",
    "save_records",
    "save_surface",
    "spectral_density",
    "spectrum",
    "trace",
    "write_report",
]
