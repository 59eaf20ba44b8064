"""The best schedule under a budget: a shortest path over the steps that are computed.

The error model is additive. One step from timestep t_i to t_(i+1) moves the latents by that difference times the
velocity, so a velocity that is off by a relative error e moves them wrong by |t_i - t_(i+1)| times e. Later steps make
more or less of it, by the calibration's `amplification`. A schedule's error is the sum of these over its steps, with
timesteps scaled so that the whole path is 1. Token kinds count alike, whatever their area. What a step adds:

* FULL: nothing.
* PARTIAL: what was recorded for the last FULL step as its source.
* REUSE, generative and margin tokens: the recorded error of extrapolating the velocities of the last computed steps,
  plus what those velocities were off by themselves, if they came from PARTIAL steps after the last FULL one. Context
  tokens: the recorded error of repeating the last FULL step.

So what a step adds depends on the last FULL step and on the last `order + 1` computed steps, and on nothing else:
these are the states of a dynamic programme. All steps of one kind cost the same, hence the numbers of FULL and
PARTIAL steps *are* the cost. They are kept as axes of each state's table, and nothing is rounded: the schedule found is
the best of all those that never take more than `longest_run` REUSE steps in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import numpy as np

from .calibration import Array, Calibration
from .errors import CalibrationError, PlanError
from .partition import TokenKind
from .schedule import StepKind

LONGEST_RUN = 12
ROUNDING = 1 + 1e-9
"""A budget that is met exactly is met, whatever the order of a sum."""
ACTIVE = (TokenKind.GENERATIVE, TokenKind.MARGIN)
Computed = tuple[int, ...]
"""The last computed steps, oldest first."""
State = tuple[int, Computed]
"""The last FULL step and the last computed steps."""
END: State = (-1, ())


class ErrorModel(Protocol):
    """What a step adds to a schedule's error."""

    def partial(self, full: int, step: int) -> float:
        """A PARTIAL step on the cache of step `full`; infinite where that is not allowed."""

    def reuse(self, full: int, computed: Computed, step: int) -> float:
        """A REUSE step after the computed steps `computed`, the last FULL one of which was `full`."""


class RecordedErrors:
    """The additive model of a calibration, for one sequence of timesteps.

    Args:
        calibration: what was measured.
        timesteps: `[S]`, those of the edit; any number of them.
        order: of extrapolation of REUSE steps: 0 repeats the last velocity, 1 goes on in a straight line, ...
    """

    def __init__(self, calibration: Calibration, timesteps: Array, order: int = 0) -> None:
        self.timesteps = timesteps
        self.order = order
        self.weights = -np.diff([*timesteps, 0.0]) / timesteps[0]
        present = calibration.counts > 0
        if not present.any():
            raise CalibrationError("the calibration holds no clip yet: run hetcache calibrate again")
        self.active = [kind for kind in ACTIVE if present[kind]]
        self.kinds = [kind for kind in TokenKind if present[kind]]
        self.amplification = calibration.amplification_at(timesteps)
        self.gram = calibration.gram_at(timesteps)
        self.repeat = calibration.reuse_errors(timesteps)
        self.of_partial = calibration.partial_errors(timesteps)
        self.extrapolated = cache(self._extrapolated)

    def partial(self, full: int, step: int) -> float:
        """See `ErrorModel`."""
        return self._weighted(step, {kind: float(self.of_partial[kind, full, step]) for kind in self.kinds})

    def reuse(self, full: int, computed: Computed, step: int) -> float:
        """See `ErrorModel`."""
        coefficients, extrapolated = self.extrapolated(computed, step)
        errors = dict(zip(self.active, extrapolated, strict=True))
        for coefficient, source in zip(coefficients, computed, strict=True):
            if source > full:
                for kind in self.active:
                    errors[kind] += abs(coefficient) * float(self.of_partial[kind, full, source])
        if TokenKind.CONTEXT in self.kinds:
            errors[TokenKind.CONTEXT] = float(self.repeat[TokenKind.CONTEXT, full, step])
        return self._weighted(step, errors)

    def _weighted(self, step: int, errors: Mapping[TokenKind, float]) -> float:
        total = sum(float(self.amplification[kind, step]) * error for kind, error in errors.items())
        return float(self.weights[step]) * total / len(self.kinds)

    def _extrapolated(self, computed: Computed, step: int) -> tuple[list[float], list[float]]:
        """Lagrange's coefficients of the computed velocities at `step`, and the relative error by active kind."""
        known = self.timesteps[list(computed)]
        at = self.timesteps[step]
        coefficients = [
            float(np.prod([(at - other) / (here - other) for other in known if other != here])) for here in known
        ]
        nodes = [*computed, step]
        combination = np.array([*coefficients, -1.0])
        errors = []
        for kind in self.active:
            squared = combination @ self.gram[kind][np.ix_(nodes, nodes)] @ combination
            errors.append(float(np.sqrt(max(squared, 0.0) / self.gram[kind, step, step])))
        return coefficients, errors


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
        allowed &= table <= budget.error * ROUNDING
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
    run = 0.0
    for step in range(computed[-1] + 1, min(computed[-1] + longest_run + 1, num_steps - 1) + 1):
        recent = (*computed, step)[-(order + 1) :]
        yield (step, recent), StepKind.FULL, run
        partial = errors.partial(full, step)
        if np.isfinite(partial):
            yield (full, recent), StepKind.PARTIAL, run + partial
        run += errors.reuse(full, computed, step)
    if computed[-1] + longest_run >= num_steps - 1:
        yield END, None, run


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
    """The error of a schedule, step by step."""
    full, total = 0, 0.0
    computed: Computed = (0,)
    for step, kind in enumerate(steps):
        if kind is StepKind.PARTIAL:
            total += errors.partial(full, step)
        elif kind is StepKind.REUSE:
            total += errors.reuse(full, computed, step)
        if kind is StepKind.FULL:
            full = step
        if kind is not StepKind.REUSE and step:
            computed = (*computed, step)[-(order + 1) :]
    return total


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
    calibration: Calibration, steps: Sequence[StepKind], timesteps: Array, share: float, order: int = 0
) -> Expectation:
    """What the calibration expects of any schedule, at M / N = `share`."""
    costs = step_costs(calibration, share)
    error = total_error(RecordedErrors(calibration, timesteps, order), steps, order)
    counts = (steps.count(StepKind.FULL), steps.count(StepKind.PARTIAL))
    return Expectation(tuple(steps), error, costs.of(*counts, len(steps)), costs.full * len(steps))


def optimal_schedule(
    calibration: Calibration, budget: Budget | str, timesteps: Array, share: float, order: int = 0
) -> tuple[StepKind, ...]:
    """The best schedule for an edit.

    Args:
        calibration: of its model and machine.
        budget: see `Budget.parse`.
        timesteps: `[S]` of the edit, decreasing.
        share: M / N of its plan.
        order: of the extrapolation of REUSE steps.

    Raises:
        PlanError: the budget cannot be kept.
        CalibrationError: the calibration is not finished.
    """
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    errors = RecordedErrors(calibration, timesteps, order)
    return shortest(errors, step_costs(calibration, share), len(timesteps), budget, order=order)


def step_costs(calibration: Calibration, share: float) -> StepCosts:
    """Seconds of a call by step kind at M / N = `share`."""
    costs = calibration.costs
    if costs is None:
        raise CalibrationError("the calibration holds no step costs yet: run hetcache calibrate again")
    return StepCosts(costs.full, costs.partial_at(share), costs.reuse)


_FULL: dict[StepKind | None, int] = {StepKind.FULL: 1, StepKind.PARTIAL: 0, None: 0}
_PARTIAL: dict[StepKind | None, int] = {StepKind.FULL: 0, StepKind.PARTIAL: 1, None: 0}
