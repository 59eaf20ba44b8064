"""The best schedule under a budget: a shortest path over the steps that are computed.

The error model is additive in squares. A *run* is a computed step and the steps after it that predict, up to the next
computed one, which may correct them (see `multistep`). What a run leaves wrong in the latents has an expected squared
error, known from the calibration. Later steps make more or less of it, by the calibration's `amplification`. Errors of
different runs are taken for independent, so that their squares add up. The unit is the mean square of an output times
that of the whole path, so that the root of a schedule's error is a share of what the path moves. Active and inactive
tokens count alike, whatever their area. What a run adds:

* Active tokens (as generative ones, see `multistep.active_kind`): a run goes from one computed step, FULL or PARTIAL,
  to the next. The output of a PARTIAL step is off by what was recorded for the last FULL step as its source.
* Inactive tokens (as context): from one FULL step to the next. The FULL step before is taken to be as far back again.

So what a run adds depends on the last FULL step and on the last `order + 1` computed steps, and on nothing else: these
are the states of a dynamic programme (a PARTIAL step before the last FULL one counts as exact). All steps of one kind
cost the same, hence the numbers of FULL and PARTIAL steps *are* the cost. They are kept as axes of each state's table,
and nothing is rounded: the schedule found is the best of all those that never take more than `longest_run` REUSE steps
in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .calibration import Array, Calibration
from .errors import CalibrationError, PlanError
from .multistep import Method, Outputs, active_kind, inactive_kind, moved, partial_errors_squared
from .schedule import StepKind

LONGEST_RUN = 14
ROUNDING = 1 + 1e-9
"""A budget that is met exactly is met, whatever the order of a sum."""
Computed = tuple[int, ...]
"""The last computed steps, oldest first."""
State = tuple[int, Computed]
"""The last FULL step and the last computed steps."""
END: State = (-1, ())


class ErrorModel(Protocol):
    """What a run adds to a schedule's squared error."""

    def runs(self, full: int, computed: Computed, stops: Sequence[int]) -> tuple[Array, Array]:
        """Runs after FULL step `full`, from the last of the steps `computed` to each step of `stops`.

        Returns:
            `[stops]` where that is a FULL step, and where it is a PARTIAL one; infinite where that is not allowed.
        """

    def last_run(self, full: int, computed: Computed) -> float:
        """The run that goes on to the end."""


class RecordedErrors:
    """The additive model of a calibration, for one edit.

    Args:
        calibration: what was measured.
        timesteps: `[S]`, those of the edit; any number of them.
        method: how outputs are predicted and corrected.
        lengths: `[S]` of `multistep.step_lengths`; by default those of Euler's method in flow matching.
    """

    def __init__(
        self, calibration: Calibration, timesteps: Array, method: Method | None = None, lengths: Array | None = None
    ) -> None:
        if not calibration.counts.any():
            raise CalibrationError("the calibration holds no clip yet: run hetcache calibrate again")
        self.method = method or Method()
        self.timesteps, lengths = timesteps, flow_lengths(timesteps) if lengths is None else lengths
        self.lengths = lengths / lengths.sum()
        gram, amplification = calibration.gram_at(timesteps), calibration.amplification_at(timesteps)
        active, inactive = active_kind(calibration), inactive_kind(calibration)
        self.active, self.inactive = (Outputs(gram[kind], self.lengths) for kind in (active, inactive))
        last = amplification[:, -1:]
        self.amplified = {
            outputs: np.concatenate([amplification, last], axis=1)[kind] ** 2
            for outputs, kind in ((self.active, active), (self.inactive, inactive))
        }
        self.allowed = np.isfinite(calibration.partial_errors(timesteps)[active])
        self.noise = partial_errors_squared(calibration, timesteps, active)
        self._inactive: dict[tuple[int, int], float] = {}

    def runs(self, full: int, computed: Computed, stops: Sequence[int]) -> tuple[Array, Array]:
        """See `ErrorModel`."""
        points, noise, index = computed[::-1], self._noise_of(full, computed), np.asarray(stops)
        inactive = np.array([self._inactive_run(full, stop) for stop in stops])
        to_full = self._left(self.active, points, noise, stops, np.zeros(len(stops)))
        to_partial = self._left(self.active, points, noise, stops, self.noise[full, index])
        return (to_full + inactive) / 2, np.where(self.allowed[full, index], to_partial / 2, np.inf)

    def last_run(self, full: int, computed: Computed) -> float:
        """See `ErrorModel`."""
        stops, known = [len(self.lengths)], self._full_steps(full, len(self.lengths))
        active = self._left(self.active, computed[::-1], self._noise_of(full, computed), stops, None)
        inactive = self._left(self.inactive, known, np.zeros(len(known)), stops, None)
        return float(active[0] + inactive[0]) / 2

    def _inactive_run(self, full: int, stop: int) -> float:
        if (full, stop) not in self._inactive:
            known = self._full_steps(full, stop)
            left = self._left(self.inactive, known, np.zeros(len(known)), [stop], np.zeros(1))
            self._inactive[full, stop] = float(left[0])
        return self._inactive[full, stop]

    def _full_steps(self, full: int, stop: int) -> Computed:
        """The last FULL steps, latest first, as far as a state knows them."""
        before = max(0, 2 * full - stop)
        return (full, before)[: self.method.order + 1] if before < full else (full,)

    def _noise_of(self, full: int, computed: Computed) -> Array:
        return np.array([self.noise[full, point] if point > full else 0.0 for point in computed[::-1]])

    def _left(self, outputs: Outputs, points: Computed, noise: Array, stops: Sequence[int], own: Array | None) -> Array:
        """`[stops]`: squared error in the end of the steps from the latest point up to each stop.

        `own` is the noise of the outputs of the stops, or None where they have none.
        """
        start = points[0]
        if own is not None and self.method.corrects:
            every = np.array([(*points, stop) for stop in stops])
            noises = np.concatenate([np.tile(noise, (len(stops), 1)), own[:, None]], axis=1)
            weights = outputs.fit_moves(start, stops, every, noises)
        else:
            every, noises = np.tile(points, (len(stops), 1)), np.tile(noise, (len(stops), 1))
            times = None if self.method.fitted else self.timesteps
            weights = moved(outputs, points, noise, max(stops), times)[[stop - start - 1 for stop in stops]]
        errors = outputs.squared_errors(start, stops, every, noises, weights)
        return np.asarray(errors * self.amplified[outputs][list(stops)])


def flow_lengths(timesteps: Array) -> Array:
    """`[S]`: how far Euler's method moves the latents in flow matching, where timesteps are noise levels."""
    return np.asarray(-np.diff([*timesteps, 0.0]))


@dataclass(frozen=True)
class Budget:
    """At most 1 / `factor` of the time of FULL steps only, or at most this error; the other is None."""

    factor: float | None = None
    error: float | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """`3x` is a time factor, `2%` an error bound.

        Raises:
            PlanError: neither.
        """
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([x%])\s*", text)
        if match is None or float(match[1]) == 0:
            raise PlanError(f"a budget is a time factor such as 3x or an error bound such as 2%, got {text!r}")
        value = float(match[1])
        return cls(factor=value) if match[2] == "x" else cls(error=value / 100)


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a call by step kind, for one M / N."""

    full: float
    partial: float
    reuse: float

    def of(self, num_full: int, num_partial: int, num_steps: int) -> float:
        """Seconds of a schedule."""
        return num_full * self.full + num_partial * self.partial + (num_steps - num_full - num_partial) * self.reuse


def shortest(
    errors: ErrorModel,
    costs: StepCosts,
    num_steps: int,
    budget: Budget,
    *,
    order: int = 0,
    longest_run: int = LONGEST_RUN,
) -> tuple[StepKind, ...]:
    """The schedule of least error in the time, or of least time with the error, that `budget` allows.

    It is optimal for `errors` among all schedules that start FULL and have at most `longest_run` REUSE steps in a row.
    Of schedules with the same error the cheapest is taken, of those with the same time the most exact.

    Raises:
        PlanError: no schedule keeps the budget.
    """
    seconds = num_steps * costs.full / budget.factor if budget.factor is not None else np.inf
    seconds *= ROUNDING
    most = [
        min(num_steps, int(seconds // cost)) if cost > 0 and np.isfinite(seconds) else num_steps
        for cost in (costs.full, costs.partial)
    ]
    tables, arrivals = _fill(errors, num_steps, order, longest_run, (most[0] + 1, most[1] + 1))
    table = tables.get(END, np.full((most[0] + 1, most[1] + 1), np.inf))
    cost = np.array([[costs.of(f, p, num_steps) for p in range(table.shape[1])] for f in range(table.shape[0])])
    allowed = np.isfinite(table) & (cost <= seconds)
    if budget.error is not None:
        allowed &= table <= budget.error**2 * ROUNDING
    if not allowed.any():
        raise PlanError(
            f"no schedule of {num_steps} steps is {budget.factor:g}x faster than FULL steps: ask for less"
            if budget.factor is not None
            else f"no schedule of {num_steps} steps keeps the error below {budget.error:.2%}: ask for more"
        )
    cells = np.argwhere(allowed)
    keys = (cost[allowed], table[allowed]) if budget.error is None else (table[allowed], cost[allowed])
    best = cells[np.lexsort(keys)[0]]
    return _trace(tables, arrivals, num_steps, (int(best[0]), int(best[1])))


Tables = dict[State, Array]
"""Least error of reaching a state with so many FULL and PARTIAL steps."""
Arrivals = dict[State, list[tuple[State, StepKind | None, float]]]
"""From where a state can be reached, by which kind of step, adding how much."""


def _fill(
    errors: ErrorModel, num_steps: int, order: int, longest_run: int, shape: tuple[int, int]
) -> tuple[Tables, Arrivals]:
    """Every reachable state, in the order of its last computed step."""
    by_step: list[Tables] = [{} for _ in range(num_steps)]
    start = np.full(shape, np.inf)
    if shape[0] > 1:
        start[1, 0] = 0.0
        by_step[0][0, (0,)] = start
    tables: Tables = {}
    arrivals: Arrivals = {}
    for layer in by_step:
        for state, table in layer.items():
            tables[state] = table
            for after, kind, error in _moves(errors, state, num_steps, order, longest_run):
                arrivals.setdefault(after, []).append((state, kind, error))
                home = by_step[after[1][-1]] if after[1] else tables
                target = home.setdefault(after, np.full(shape, np.inf))
                moved, source = _shifted(target, kind), table[: shape[0] - _FULL[kind], : shape[1] - _PARTIAL[kind]]
                np.minimum(moved, source + error, out=moved)
    return tables, arrivals


def _moves(
    errors: ErrorModel, state: State, num_steps: int, order: int, longest_run: int
) -> Iterator[tuple[State, StepKind | None, float]]:
    """From a computed step over a run of REUSE steps to the next computed step, or to the end."""
    full, computed = state
    stops = range(computed[-1] + 1, min(computed[-1] + longest_run + 1, num_steps - 1) + 1)
    for stop, to_full, to_partial in zip(stops, *errors.runs(full, computed, stops), strict=True) if stops else ():
        recent = (*computed, stop)[-(order + 1) :]
        yield (stop, recent), StepKind.FULL, float(to_full)
        if np.isfinite(to_partial):
            yield (full, recent), StepKind.PARTIAL, float(to_partial)
    if computed[-1] + longest_run >= num_steps - 1:
        yield END, None, errors.last_run(full, computed)


def _shifted(table: Array, kind: StepKind | None) -> Array:
    """The part of a table that a step of this kind can lead to."""
    return table[_FULL[kind] :, _PARTIAL[kind] :]


def _trace(tables: Tables, arrivals: Arrivals, num_steps: int, cell: tuple[int, int]) -> tuple[StepKind, ...]:
    """The steps of the best path to the end that has `cell` FULL and PARTIAL steps."""
    steps = [StepKind.REUSE] * num_steps
    steps[0] = StepKind.FULL
    state = END
    while state != (0, (0,)):
        best: tuple[float, State, StepKind | None, tuple[int, int]] | None = None
        for before, kind, error in arrivals[state]:
            place = (cell[0] - _FULL[kind], cell[1] - _PARTIAL[kind])
            if min(place) >= 0 and (best is None or tables[before][place] + error < best[0]):
                best = (float(tables[before][place]) + error, before, kind, place)
        assert best is not None
        _, before, kind, cell = best
        if kind is not None:
            steps[state[1][-1]] = kind
        state = before
    return tuple(steps)


def total_error(errors: ErrorModel, steps: Sequence[StepKind], order: int = 0) -> float:
    """The squared error of a schedule, run by run."""
    full, total = 0, 0.0
    computed: Computed = (0,)
    for step, kind in enumerate(steps):
        if kind is StepKind.REUSE or not step:
            continue
        total += float(errors.runs(full, computed, [step])[kind is StepKind.PARTIAL][0])
        if kind is StepKind.FULL:
            full = step
        computed = (*computed, step)[-(order + 1) :]
    return total + errors.last_run(full, computed)


@dataclass(frozen=True)
class Expectation:
    """What a calibration expects of a schedule.

    Attributes:
        steps: the schedule.
        error: of the last latents, over what the whole path moves them; infinite where it was not measured.
        seconds: in the model, of one branch of guidance.
        full_seconds: of as many FULL steps.
    """

    steps: tuple[StepKind, ...]
    error: float
    seconds: float
    full_seconds: float

    @property
    def time_factor(self) -> float:
        """How much less time than FULL steps only."""
        return self.full_seconds / self.seconds

    def describe(self) -> str:
        """One line."""
        counts = ", ".join(f"{self.steps.count(kind)} {kind.name}" for kind in StepKind)
        error = f"{self.error:.2%}" if np.isfinite(self.error) else "unknown, as a FULL step is too long ago,"
        return (
            f"{counts}: {self.time_factor:.2f}x less time in the model than {len(self.steps)} FULL steps "
            f"({self.seconds:.3g} s instead of {self.full_seconds:.3g} s), error of the result {error} expected"
        )


def expect(
    calibration: Calibration,
    steps: Sequence[StepKind],
    timesteps: Array,
    share: float,
    method: Method | None = None,
    lengths: Array | None = None,
) -> Expectation:
    """What the calibration expects of any schedule, at M / N = `share`; see `optimal_schedule`."""
    costs, method = step_costs(calibration, share), method or Method()
    error = total_error(RecordedErrors(calibration, timesteps, method, lengths), steps, method.order)
    counts = (steps.count(StepKind.FULL), steps.count(StepKind.PARTIAL))
    return Expectation(tuple(steps), float(np.sqrt(error)), costs.of(*counts, len(steps)), costs.full * len(steps))


def optimal_schedule(
    calibration: Calibration,
    budget: Budget | str,
    timesteps: Array,
    share: float,
    method: Method | None = None,
    lengths: Array | None = None,
) -> tuple[StepKind, ...]:
    """The best schedule for an edit.

    Args:
        calibration: of its model and machine.
        budget: see `Budget.parse`.
        timesteps: `[S]` of the edit, decreasing.
        share: M / N of its plan.
        method: how outputs are predicted and corrected.
        lengths: `[S]` of its solver, see `multistep.step_lengths`.

    Raises:
        PlanError: the budget cannot be kept.
        CalibrationError: the calibration is not finished.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    method = method or Method()
    errors = RecordedErrors(calibration, timesteps, method, lengths)
    return shortest(errors, step_costs(calibration, share), len(timesteps), budget, order=method.order)


def step_costs(calibration: Calibration, share: float) -> StepCosts:
    """Seconds of a call by step kind at M / N = `share`."""
    costs = calibration.costs
    if costs is None:
        raise CalibrationError("the calibration holds no step costs yet: run hetcache calibrate again")
    return StepCosts(costs.full, costs.partial_at(share), costs.reuse)


_FULL: dict[StepKind | None, int] = {StepKind.FULL: 1, StepKind.PARTIAL: 0, None: 0}
_PARTIAL: dict[StepKind | None, int] = {StepKind.FULL: 0, StepKind.PARTIAL: 1, None: 0}
