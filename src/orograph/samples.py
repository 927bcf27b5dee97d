"""Losses at places of a plane: evaluated once, kept in a file, found again after a crash."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from .crowds import losses_of
from .durable import append_line, fingerprint, read_lines, sealed_line
from .errors import OrographWarning
from .evaluation import PerExample
from .grids import Place
from .identity import identity_of, measured_losses, point_identity, short_hash
from .linalg.checkpoints import agree
from .memory import free_bytes
from .objective import Objective
from .planes import Plane
from .profiles import difference_sem
from .renormalise import renormalised_all, running_norms
from .results import Point

SurfaceStatistics = Literal["auto", "frozen", "reestimated"]
TOGETHER, GROUP_SECONDS = 25, 60.0  # places that go through the data at once
WITNESSES = 3  # samples found that are evaluated again


@dataclass
class Samples:
    """Losses over one plane for one data set and one policy for running statistics.

    `evaluations`: losses of the whole data that were evaluated, whatever for (given: those before, to choose the plane and the data); `passes`: forward passes that this took, two for a loss where running statistics are re-estimated ·
    `path`: a file of JSON lines; a line is one sample with its own SHA-256, appended as soon as it is there. Damaged lines are told and evaluated anew; what cannot
    be appended (no room, no permission) is warned of once and tried again · `reference`: the place that errors are differences to.
    """

    objective: Objective
    plane: Plane
    statistics: SurfaceStatistics
    path: Path | None = None
    report: Callable[[int, int], None] = lambda done, expected: None
    reference: Place = (0.0, 0.0)
    found: dict[Place, tuple[float, float]] = field(default_factory=dict)
    evaluations: int = 0
    passes: int = 0
    before: int = field(init=False)  # evaluations that were given
    refused: list[Place] = field(default_factory=list)  # places whose stored samples are another loss's, evaluated to know that
    key: str = field(init=False)  # a hash of what the losses depend on
    _unsaved: list[bytes] = field(default_factory=list)  # lines that could not be appended
    _warned: bool = False
    _referred: list[PerExample | None] = field(default_factory=list)  # the losses of examples at the reference, once they are known
    _together: int = 1
    _expected: int = 0  # evaluations when what is asked for now is there

    def __post_init__(self) -> None:
        self.key, self.before = self._hash(), self.evaluations
        if not self._repeats:
            self._together = self._affordable(0.0)
        if self.path is not None:
            self._take(read_store(self.path))

    def _take(self, stored: dict[str, dict[Place, tuple[float, float]]]) -> None:
        """Find the samples that have the losses of now: no hash knows everything of a user's own loss and model, and far from the origin both show."""
        key, again = self.key, 1
        now: dict[Place, tuple[float, float]] = {}
        while self.key in stored:
            chosen = self._witnesses(stored[self.key])
            new = [place for place in chosen if place not in now]
            self._expected = self.evaluations + self.price(len(new))
            if new:
                self._evaluate(new, keep=False)
            now, self.found = now | self.found, {}
            losses = measured_losses(self.objective, [now[place][0] for place in chosen])
            if agree(losses | {"values": [stored[self.key][place][0] for place in chosen]}, losses):
                self.found = stored[self.key]
                self.refused = [place for place in now if place not in self.found]
                return
            again += 1
            self.key = f"{key}-{again}"
        self.refused, self.found = list(now), now
        self._unsaved += [self._line(place) for place in now]
        self._save()

    def _witnesses(self, stored: dict[Place, tuple[float, float]]) -> list[Place]:
        """Stored places that are evaluated again: the reference, which is needed anyway, the one with the highest loss, and those farthest from the origin."""
        places = sorted(stored, key=lambda place: (place[0] ** 2 + place[1] ** 2, place), reverse=True)
        highest = max(places, key=lambda place: stored[place][0] if math.isfinite(stored[place][0]) else -math.inf)
        return [place for place in dict.fromkeys([self.reference, highest, *places]) if place in stored][:WITNESSES]

    def _hash(self) -> str:
        objective = self.objective
        own = {name: value for name, value in identity_of(objective).items() if name != "weights"}  # those of the plane's origin count
        if self.statistics == "reestimated":
            own["sizes"] = objective.terms().batches.reading.sizes  # whose statistics are used depends on the batches
        return short_hash(own, self.statistics, self.reference, point_identity(objective.point(self.plane.origin)), fingerprint([self.plane.u, self.plane.v]))

    def referred(self) -> PerExample | None:
        """The losses of the single examples at the reference."""
        if not self._referred:
            self._evaluate([], keep=self.reference not in self.found)
        return self._referred[0]

    @property
    def _repeats(self) -> bool:
        """Whether examples come in the same order in every pass."""
        return self.objective.terms().batches.repeats

    def price(self, places: int) -> int:
        """Evaluations for some new places: where examples come in another order in every pass, the reference goes with every group, for differences of single examples."""
        return places if self._repeats else places + math.ceil(places / TOGETHER)

    @property
    def policy(self) -> str:
        """What BatchNorm uses, in words; nothing for a network without running statistics."""
        if not running_norms(self.objective.snapshot.model):
            return ""
        own = self.plane.origin.label if isinstance(self.plane.origin, Point) else self.objective.label
        return "each batch's own statistics" if self.objective.mode == "batch" else f"running statistics of {own}" if self.statistics == "frozen" else "running statistics re-estimated at every point"

    def losses(self, places: Sequence[Place]) -> list[float]:
        """The losses at some places."""
        return [loss for loss, _ in self.at(places)]

    def at(self, places: Sequence[Place]) -> list[tuple[float, float]]:
        """For each place the loss, and the standard error over examples of its difference to the loss at the reference.

        Places go through the data together, batch by batch, as many as a minute, a quarter of the free memory and `TOGETHER` allow: a killed job loses no more.
        """
        wanted = [place for place in dict.fromkeys(places) if place not in self.found]
        self._expected = self.evaluations + self.price(len(wanted))
        while wanted:
            group, wanted = wanted[: self._together], wanted[self._together :]
            began = time.perf_counter()
            self._evaluate(group)
            if self._repeats:
                self._together = self._affordable((time.perf_counter() - began) / len(group))
            wanted = [place for place in wanted if place not in self.found]  # the reference may have come with them
        return [self.found[place] for place in places]

    def own_losses(self, networks: Sequence[Point]) -> list[float]:
        """The losses of networks themselves, which need not lie in the plane."""
        size, found = self._affordable(0.0), list[float]()
        for start in range(0, len(networks), size):
            found += [loss for loss, _ in losses_of(self.objective, networks[start : start + size])]
        self.evaluations, self.passes = self.evaluations + len(networks), self.passes + len(networks)
        return found

    def level_error(self) -> float:
        """Standard error over examples of the loss at the reference itself, by which the whole picture may be too high or too low."""
        nothing, there = PerExample(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)), self.referred()
        return math.nan if there is None else difference_sem(nothing, nothing, there, 0.5)

    def _evaluate(self, group: Sequence[Place], *, keep: bool = True) -> None:
        """Evaluate places together, with the reference where its examples are needed: in one pass with the others, since examples that come in another order make no pairs."""
        before = self.evaluations
        crowd = [*group, self.reference] if self.reference not in group and not (self._referred and self._repeats) else list(group)
        points = [self.objective.point(self.plane(s, t)) for s, t in crowd]
        renormalises = self.statistics == "reestimated" and bool(running_norms(self.objective.snapshot.model))
        if renormalises:
            points = renormalised_all(self.objective, points)
        self._expected = max(self._expected, before + len(crowd))
        losses = losses_of(self.objective, points, lambda done: self.report(before + int(done * len(crowd)), self._expected))
        if self.reference in crowd:
            self._referred = [losses[crowd.index(self.reference)][1]]
        (there,) = self._referred
        for (s, t), (loss, examples) in zip(crowd, losses, strict=True):
            if (s, t) in self.found:
                continue
            error = math.nan if examples is None or there is None else difference_sem(there, there, examples, 0.5)
            self.found[s, t] = loss, error
            if keep:
                self._unsaved.append(self._line((s, t)))
        self._save()
        self.evaluations, self.passes = before + len(crowd), self.passes + len(crowd) * (2 if renormalises else 1)
        self.report(self.evaluations, self._expected)

    def _line(self, place: Place) -> bytes:
        loss, error = self.found[place]
        return sealed_line({"key": self.key, "s": place[0], "t": place[1], "loss": loss, "error": error})

    def _save(self) -> None:
        """Append what is not on disk yet; a failure is warned of once, and ends nothing."""
        if self.path is None:
            self._unsaved.clear()
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while self._unsaved:
                append_line(self.path, self._unsaved[0])
                del self._unsaved[0]
        except OSError as error:
            if not self._warned:
                warnings.warn(f"samples cannot be saved in store={str(self.path)!r} ({error.strerror or error}). The picture goes on, and saving is tried again.", OrographWarning, stacklevel=2)
            self._warned = True

    def close(self) -> None:
        """Save what could not be saved before; a warning says what is still not on disk."""
        self._save()
        if self._unsaved:
            warnings.warn(f"{len(self._unsaved)} samples are not in store={str(self.path)!r}, and would be evaluated again. Make room there, or give another file.", OrographWarning, stacklevel=2)

    def _affordable(self, seconds: float) -> int:
        """How many places to take together, from what one took."""
        point = self.objective.point()
        size = sum(tensor.numel() * tensor.element_size() for tensor in (point.theta, point.theta, *point.buffers.values())) + 32 * self.objective.examples
        return max(min(TOGETHER, int(GROUP_SECONDS / max(seconds, 1e-9)), free_bytes(self.objective.device) // 4 // size), 1)



def read_store(path: Path) -> dict[str, dict[Place, tuple[float, float]]]:
    """The samples in a file, by the key of their losses; none where there is no file. What is damaged is warned of. ValueError where the file cannot be read."""
    found: dict[str, dict[Place, tuple[float, float]]] = {}
    unfinished: list[int] = []
    damaged: list[int] = []
    try:
        for line in read_lines(path):
            row = line.content
            if row is not None and line.sealed:
                found.setdefault(row["key"], {})[row["s"], row["t"]] = row["loss"], row["error"]
            else:
                (unfinished if line.unfinished else damaged).append(line.number)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"store={str(path)!r} cannot be read: {error.strerror or error}. Give the name of a file that can, or of a new one.") from error
    for lines, why in ((unfinished, "unfinished (the writer was stopped)"), (damaged, "damaged, or no samples of this version of Orograph")):
        if lines:
            which = f"line{'s' if len(lines) > 1 else ''} {', '.join(map(str, lines[:5]))}{f' and {len(lines) - 5} more' if len(lines) > 5 else ''}"
            warnings.warn(f"store={str(path)!r}, {which}: {why}. What is missing is evaluated anew.", OrographWarning, stacklevel=3)
    return found


def chosen_policy(statistics: SurfaceStatistics, objective: Objective, networks: int) -> SurfaceStatistics:
    """The policy for running statistics; "auto": re-estimated in a plane of several networks, each of which has its own, else frozen."""
    if statistics != "auto":
        return statistics
    return "reestimated" if networks > 1 and objective.mode != "batch" and running_norms(objective.snapshot.model) else "frozen"
