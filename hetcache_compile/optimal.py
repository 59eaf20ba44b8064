"""The best schedule under a budget: a shortest path over the steps that are computed.

The error model is additive in squares. A *run* is a computed step and the steps after it that predict, up to the next
computed one, which may correct them (see `multistep`). What a run leaves wrong in the latents has an expected squared
error, known from the calibration. Later steps make more or less of it, by the calibration's `amplification`. The unit
is the mean square of an output times that of the whole path, so that the root of a schedule's error is a share of what
the path moves. Active and inactive tokens count alike, whatever their area. What a run adds:

* Active tokens (as generative ones, see `multistep.active_kind`): a run goes from one computed step, FULL or PARTIAL,
  to the next. The output of a PARTIAL step is off by what was recorded for the last FULL step as its source.
* Inactive tokens (as context): from one FULL step to the next. The FULL step before is taken to be as far back again.

What predictions miss differs from run to run, so these errors are taken for independent and their squares add up. What
PARTIAL steps are off by does not: they all read stale context. Where two of these errors have correlation r, the
squares of n of them count 1 + r (n - 1) times.

So what a run adds depends on the last FULL step and on the last `order + 1` computed steps, and, by one factor, on the
number of PARTIAL steps. The steps are the states of a dynamic programme (a PARTIAL step before the last FULL one counts
as exact), which is solved for one factor at a time. All steps of one kind cost the same, hence the numbers of FULL and
PARTIAL steps *are* the cost. They are kept as axes of each state's table, and nothing is rounded: the schedule found is
the best of all those that never take more than `longest_run` REUSE steps in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np

from .calibration import Array, Calibration
from .errors import CalibrationError, PlanError
from .multistep import Index, Method, Outputs, active_kind, inactive_kind, moved, partial_errors_squared
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
    """What a run adds to a schedule's squared error: what predictions miss, and what PARTIAL steps are off by.

    Attributes:
        correlation: of what PARTIAL steps are off by.
    """

    correlation: float

    def runs(self, full: Index, computed: Index, stops: Index) -> tuple[Array, Array]:
        """B runs, each after the FULL step `full` and from the last of the steps `computed` to its stop.

        Args:
            full: `[B]`.
            computed: `[B, P]`, the last computed steps, oldest first.
            stops: `[B]`.

        Returns:
            `[B, 2]` where the stop is a FULL step, and where it is a PARTIAL one; infinite where that is not allowed.
        """

    def last_runs(self, full: Index, computed: Index) -> Array:
        """`[B, 2]`: runs that go on to the end."""


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
        self.correlation = calibration.correlation_of(active)
        self.active = Outputs(gram[active], self.lengths, self.correlation)
        self.inactive = Outputs(gram[inactive], self.lengths)
        last = amplification[:, -1:]
        self.amplified = {
            outputs: np.concatenate([amplification, last], axis=1)[kind] ** 2
            for outputs, kind in ((self.active, active), (self.inactive, inactive))
        }
        self.allowed = np.isfinite(calibration.partial_errors(timesteps)[active])
        self.noise = partial_errors_squared(calibration, timesteps, active)
        self.inactive_runs = self._inactive_runs(np.arange(len(self.lengths)))

    def runs(self, full: Index, computed: Index, stops: Index) -> tuple[Array, Array]:
        """See `ErrorModel`."""
        points = computed[:, ::-1]
        noise = self._noise_of(full, points)
        to_full = self._left(self.active, points, noise, stops, np.zeros(len(stops)))
        to_full[:, 0] += self.inactive_runs[full, stops]
        to_partial = self._left(self.active, points, noise, stops, self.noise[full, stops])
        return to_full / 2, np.where(self.allowed[full, stops][:, None], to_partial / 2, np.inf)

    def last_runs(self, full: Index, computed: Index) -> Array:
        """See `ErrorModel`."""
        points = computed[:, ::-1]
        stops = np.full(len(full), len(self.lengths))
        left = self._left(self.active, points, self._noise_of(full, points), stops, None)
        left[:, 0] += self.inactive_runs[full, -1]
        return left / 2

    def _inactive_runs(self, steps: Index) -> Array:
        """`[S, S + 1]`: errors of inactive tokens from one FULL step to the next, or to the end."""
        result = np.zeros((len(steps), len(steps) + 1))
        for full in steps:
            stops = np.arange(full + 1, len(steps) + 1)
            points = np.full((len(stops), 1), full)
            if full and self.method.order:
                points = np.concatenate([points, np.maximum(0, 2 * full - stops)[:, None]], axis=1)
            for these, own in ((stops < len(steps), np.zeros(len(stops) - 1)), (stops == len(steps), None)):
                if these.any():
                    noise = np.zeros(points[these].shape)
                    left = self._left(self.inactive, points[these], noise, stops[these], own)
                    result[full, stops[these]] = left[:, 0]
        return result

    def _noise_of(self, full: Index, points: Index) -> Array:
        return np.asarray(np.where(points > full[:, None], self.noise[full[:, None], points], 0.0))

    def _left(self, outputs: Outputs, points: Index, noise: Array, stops: Index, own: Array | None) -> Array:
        """`[B, 2]`: squared error in the end of the steps from the latest point up to each stop.

        `own` is the noise of the outputs of the stops, or None where they have none.
        """
        starts = points[:, 0]
        if own is not None and self.method.corrects:
            points = np.concatenate([points, stops[:, None]], axis=1)
            noise = np.concatenate([noise, own[:, None]], axis=1)
            weights = outputs.fit_moves(starts, stops, points, noise)
        else:
            weights = moved(outputs, stops, points, noise, None if self.method.fitted else self.timesteps)
        errors = [outputs.missed(starts, stops, points, weights), outputs.passed_on(noise, weights)]
        return np.asarray(np.stack(errors, axis=1) * self.amplified[outputs][stops][:, None])


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
    graph = _Graph(errors, num_steps, order, longest_run)
    all_full = num_steps * costs.full
    if budget.factor is not None:
        found = _search(graph, costs, errors.correlation, all_full / budget.factor, np.inf)
    else:
        # Whatever takes less than a time in which the bound can be kept takes part in the search of that time.
        times = [all_full * share for share in (1 / 16, 1 / 8, 1 / 4, 1 / 2)] + [np.inf]
        bound = budget.error**2 if budget.error is not None else np.inf
        searches = (_search(graph, costs, errors.correlation, seconds, bound) for seconds in times)
        found = next((steps for steps in searches if steps is not None), None)
    if found is None:
        raise PlanError(
            f"no schedule of {num_steps} steps is {budget.factor:g}x faster than FULL steps: ask for less"
            if budget.factor is not None
            else f"no schedule of {num_steps} steps keeps the error below {budget.error:.2%}: ask for more"
        )
    return found


def _search(
    graph: _Graph, costs: StepCosts, correlation: float, seconds: float, bound: float
) -> tuple[StepKind, ...] | None:
    """The best schedule within both: of least error if `bound` is infinite, else of least time. None without any.

    The factor of a number of PARTIAL steps bounds that of any larger number from below. So the numbers are tried from
    the smallest, and those that could not be better than what was found are left out.
    """
    num_steps, seconds, bound = graph.num_steps, seconds * ROUNDING, bound * ROUNDING
    most_full, most = (
        min(num_steps, int(seconds // cost)) if cost > 0 and np.isfinite(seconds) else num_steps
        for cost in (costs.full, costs.partial)
    )
    least, best = 0, None
    while least <= most:
        factor = noise_factor(correlation, least)
        tables = graph.solve(factor, (most_full + 1, most + 1))
        table = tables[-1]
        cost = np.array([[costs.of(f, p, num_steps) for p in range(most + 1)] for f in range(most_full + 1)])
        allowed = np.isfinite(table) & (cost <= seconds) & (table <= bound)
        first, second = (cost, table) if np.isfinite(bound) else (table, cost)
        promising = set()
        for full, partial in np.argwhere(allowed[:, least:]) + [0, least]:
            key = float(first[full, partial]), float(second[full, partial])
            if best is not None and key >= best[0]:
                continue
            if noise_factor(correlation, partial) == factor:
                best = key, graph.trace(tables, factor, (int(full), int(partial)))
            else:
                promising.add((key, int(partial)))
        left = [partial for key, partial in promising if best is None or key < best[0]]
        if not left:
            break
        least, most = min(left), max(left)
    return best[1] if best else None


def noise_factor(correlation: float, num_partial: int) -> float:
    """How often the squared errors of so many PARTIAL steps count."""
    return 1 + correlation * max(0, num_partial - 1)


class _Graph:
    """Every reachable state, in the order of its last computed step, and from where it is reached."""

    def __init__(self, errors: ErrorModel, num_steps: int, order: int, longest_run: int) -> None:
        self.num_steps = num_steps
        by_step: list[dict[State, None]] = [{} for _ in range(num_steps)]
        by_step[0][0, (0,)] = None
        self.states: list[State] = []
        arrivals: dict[State, list[tuple[int, Array]]] = {END: []}
        for layer in by_step:
            places = {state: len(self.states) + place for place, state in enumerate(layer)}
            self.states += layer
            for before, after, error in _moves(errors, list(layer), num_steps, order, longest_run):
                arrivals.setdefault(after, []).append((places[before], error))
                if after != END:
                    by_step[after[1][-1]][after] = None
        self.states.append(END)
        self.sources = [np.array([source for source, _ in arrivals.get(state, [])], int) for state in self.states]
        self.errors = [np.array([error for _, error in arrivals.get(state, [])]) for state in self.states]
        self.taken = [_taken(state) for state in self.states]

    def solve(self, factor: float, shape: tuple[int, int]) -> Array:
        """`[states, *shape]`: the least error of reaching a state with so many FULL and so many PARTIAL steps."""
        tables = np.full((len(self.states), *shape), np.inf)
        tables[0, 1:2, :1] = 0.0
        rest = zip(tables, self.sources, self.errors, self.taken, strict=True)
        for table, sources, errors, (full, partial) in list(rest)[1:]:
            if sources.size:
                before = tables[sources, : shape[0] - full, : shape[1] - partial]
                before += (errors @ (1.0, factor))[:, None, None]
                before.min(axis=0, out=table[full:, partial:])
        return tables

    def trace(self, tables: Array, factor: float, cell: tuple[int, int]) -> tuple[StepKind, ...]:
        """The steps of the best path to the end that has `cell` FULL and PARTIAL steps."""
        steps = [StepKind.REUSE] * self.num_steps
        steps[0] = StepKind.FULL
        place = len(self.states) - 1
        while place:
            full, partial = self.taken[place]
            if place < len(self.states) - 1:
                steps[self.states[place][1][-1]] = StepKind.FULL if full else StepKind.PARTIAL
            cell = (cell[0] - full, cell[1] - partial)
            errors = tables[self.sources[place], cell[0], cell[1]] + self.errors[place] @ (1.0, factor)
            place = int(self.sources[place][errors.argmin()])
        return tuple(steps)


def _taken(state: State) -> tuple[int, int]:
    """How many FULL and how many PARTIAL steps the last move to a state is."""
    full, computed = state
    return (0, 0) if not computed else (1, 0) if full == computed[-1] else (0, 1)


def _moves(
    errors: ErrorModel, layer: list[State], num_steps: int, order: int, longest_run: int
) -> Iterator[tuple[State, State, Array]]:
    """From states with one last computed step, over a run of REUSE steps, to the next computed step or to the end."""
    for length in sorted({len(computed) for _, computed in layer}):
        states = [state for state in layer if len(state[1]) == length]
        full, computed = np.array([state[0] for state in states]), np.array([state[1] for state in states])
        last = int(computed[0, -1])
        stops = range(last + 1, min(last + longest_run + 1, num_steps - 1) + 1)
        if stops:
            runs = errors.runs(
                full.repeat(len(stops)), computed.repeat(len(stops), axis=0), np.tile(stops, len(states))
            )
            for (before, stop), to_full, to_partial in zip(product(states, stops), *runs, strict=True):
                recent = (*before[1], stop)[-(order + 1) :]
                yield before, (stop, recent), to_full
                if np.isfinite(to_partial[0]):
                    yield before, (before[0], recent), to_partial
        if last + longest_run >= num_steps - 1:
            for before, error in zip(states, errors.last_runs(full, computed), strict=True):
                yield before, END, error


def total_error(errors: ErrorModel, steps: Sequence[StepKind], order: int = 0) -> float:
    """The squared error of a schedule, run by run."""
    full, total = 0, np.zeros(2)
    computed: Computed = (0,)
    for step, kind in enumerate(steps):
        if kind is StepKind.REUSE or not step:
            continue
        runs = errors.runs(np.array([full]), np.array([computed]), np.array([step]))
        total += runs[kind is StepKind.PARTIAL][0]
        if kind is StepKind.FULL:
            full = step
        computed = (*computed, step)[-(order + 1) :]
    missed, off = total + errors.last_runs(np.array([full]), np.array([computed]))[0]
    return float(missed + noise_factor(errors.correlation, steps.count(StepKind.PARTIAL)) * off)


@dataclass(frozen=True)
class Expectation:
    """What a calibration expects of a schedule.

    Attributes:
        steps: the schedule.
        error: of the last latents, over what the whole path moves them; infinite where it was not measured.
        seconds: in the model, of one branch of guidance, at the size that the calibration timed.
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
            f"{counts}: {self.time_factor:.2f}x less time in the model than {len(self.steps)} FULL steps, "
            f"error of the result {error} expected"
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
