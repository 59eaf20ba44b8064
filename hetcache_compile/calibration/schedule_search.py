"""The best schedule under a budget: a shortest path over the steps that are computed.

What a run adds to a schedule's error (see `error_model`) depends on the last FULL step and on the last `order + 1`
computed steps, and, by one factor, on the number of PARTIAL steps. The steps are the states of a dynamic programme (a
PARTIAL step before the last FULL one counts as exact), which is solved for one factor at a time. All steps of one kind
cost the same, hence the numbers of FULL and PARTIAL steps *are* the cost. They are kept as axes of each state's table,
and nothing is rounded: the schedule found is the best of all those that never take more than `longest_run` REUSE steps
in a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..errors import PlanError
from ..plan.schedule import StepKind
from .output_weights import Index
from .record import Array

LONGEST_RUN = 14
ROUNDING = 1 + 1e-9
"""A budget that is met exactly is met, whatever the order of a sum."""
NONE = -1
"""In the place of a computed step that there is not."""
_Runs = tuple[Index, Index, Array]
"""Runs that stop at one step: the states `[R, order + 2]` that they lead to, their sources `[R]`, and their errors."""


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
    """Seconds of a call by step kind, for one M / N.

    Attributes:
        full: where the calls of a step share their context, the mean of a FULL one and of those that read its keys and
            values.
        partial: of a PARTIAL call.
        reuse: of a REUSE call.
        uncached: what budgets are measured against; by default `full`.
    """

    full: float
    partial: float
    reuse: float
    uncached: float | None = None

    @property
    def baseline(self) -> float:
        """Of a call where every step is FULL and nothing is shared."""
        return self.full if self.uncached is None else self.uncached

    def of(self, num_full: Any, num_partial: Any, num_steps: int) -> Any:
        """Seconds of a schedule, or of several at once."""
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
    seconds = np.inf if budget.factor is None else num_steps * costs.baseline / budget.factor
    bound = np.inf if budget.error is None else budget.error**2
    found = _search(graph, costs, errors.correlation, seconds * ROUNDING, bound * ROUNDING)
    if found is None:
        raise PlanError(
            f"no schedule of {num_steps} steps with at most {longest_run} REUSE steps in a row is {budget.factor:g}x "
            "faster than FULL steps: ask for less"
            if budget.factor is not None
            else f"no schedule of {num_steps} steps keeps the error below {budget.error:.2%}: ask for more"
        )
    return found


def _search(
    graph: _Graph, costs: StepCosts, correlation: float, seconds: float, bound: float
) -> tuple[StepKind, ...] | None:
    """The best schedule within both: of least error if `bound` is infinite, else of least time. None without any.

    Up to one PARTIAL step, squared errors count once: these schedules are few, and the best of them says what no better
    one can have. The factor of a number of PARTIAL steps bounds that of any larger number from below. So the other
    numbers are tried from the smallest, and those that could not be better than what was found are left out.
    """
    num_steps, by_error = graph.num_steps, not np.isfinite(bound)
    counts = _counts_on_the_way(costs, num_steps, seconds)
    counts, least, best = counts[counts[:, 1] <= 1], 0, None
    while counts.size:
        factor = noise_factor(correlation, least)
        tables = graph.solve(factor, counts, best[0][0] if best and by_error else bound)
        error, cost = tables[-1], costs.of(counts[:, 0], counts[:, 1], num_steps)
        allowed = np.isfinite(error) & (cost <= seconds) & (error <= bound) & (counts[:, 1] >= least)
        first, second = (error, cost) if by_error else (cost, error)
        exact = noise_factor(correlation, counts[:, 1]) == factor
        order = np.lexsort((second, first))
        # A schedule that is only promising may be good enough to leave others out.
        for cell in {int(cells[0]) for cells in (order[allowed[order]], order[(allowed & exact)[order]]) if cells.size}:
            steps, (missed, off) = graph.trace(tables, factor, counts, cell)
            true = float(missed + noise_factor(correlation, counts[cell, 1]) * off)
            key = (true, float(cost[cell])) if by_error else (float(cost[cell]), true)
            if true <= bound and (best is None or key < best[0]):
                best = key, steps
        if not least:
            least = 2
            counts = _counts_on_the_way(costs, num_steps, best[0][0] if best and not by_error else seconds)
            continue
        left = allowed & ~exact
        if best is not None:
            left &= (first < best[0][0]) | ((first == best[0][0]) & (second < best[0][1]))
        if not left.any():
            break
        least, most = counts[left, 1].min(), counts[left].max(axis=0)
        counts = counts[(counts <= most).all(axis=1)]
    return best[1] if best else None


def _counts_on_the_way(costs: StepCosts, num_steps: int, seconds: float) -> Index:
    """`[C, 2]`: numbers of FULL and PARTIAL steps of which more, or none, may be added within the time."""
    full, partial = np.indices((num_steps + 1, num_steps + 1))
    within = (full + partial <= num_steps) & (costs.of(full, partial, num_steps) <= seconds)
    for axis in (0, 1):
        within = np.flip(np.logical_or.accumulate(np.flip(within, axis), axis=axis), axis)
    return np.argwhere(within)


def noise_factor(correlation: float, num_partial: Any) -> Any:
    """How often the squared errors of so many PARTIAL steps count; also of several numbers at once."""
    return 1 + correlation * np.maximum(0, num_partial - 1)


class _Graph:
    """Every state that can be reached, and the runs between states.

    A state is the last FULL step and the last computed steps. States are numbered by their last step; the last state is
    the end. Runs are sorted by the state that they lead to.

    Attributes:
        states: `[V, order + 2]`: the last FULL step, then the last computed steps, oldest first, after `NONE` for those
            that there are not. The end has `num_steps` for all of them.
        kinds: V: what the last computed step is; None for the end.
        begins: `[V + 1]`: where the runs to a state begin.
        sources: `[E]`: the state that a run comes from.
        errors: `[E, 2]`: see `ErrorModel`.
    """

    def __init__(self, errors: ErrorModel, num_steps: int, order: int, longest_run: int) -> None:
        self.num_steps = num_steps
        arriving: list[list[_Runs]] = [[] for _ in range(num_steps + 1)]
        arriving[0] = [(np.array([[0, *[NONE] * order, 0]]), np.array([0]), np.zeros((1, 2)))]
        self.kinds: list[StepKind | None] = []
        layers, number = [], 0
        for step, runs in enumerate(arriving):
            states, *_ = layer = _meet(runs, num_steps)
            layers.append(layer)
            if step < num_steps:
                self.kinds += [StepKind.FULL if full == step else StepKind.PARTIAL for full in states[:, 0]]
                for stop, run in _leave(errors, states, number, num_steps, longest_run):
                    arriving[stop].append(run)
            number += len(states)
        self.kinds.append(None)
        self.states, counts, self.sources, self.errors = (np.concatenate(parts) for parts in zip(*layers, strict=True))
        self.begins = np.concatenate([[0], np.cumsum(counts)])

    def solve(self, factor: float, counts: Index, most: float = np.inf) -> Array:
        """`[V, C]`: the least error of reaching a state with so many FULL and PARTIAL steps.

        Args:
            factor: of what PARTIAL steps are off by.
            counts: `[C, 2]`; with a number of steps of one kind, all smaller ones.
            most: no schedule of more error than this has to be found.
        """
        errors = self.errors @ (1.0, factor)
        kept = errors <= most
        errors, sources = errors[kept, None], self.sources[kept]
        begins = np.concatenate([[0], np.cumsum(kept)])[self.begins].tolist()
        before = {kind: _one_fewer(counts, kind) for kind in set(self.kinds)}
        tables = np.full((len(self.states), len(counts)), np.inf)
        tables[0, (counts == (1, 0)).all(axis=1)] = 0.0
        for state, kind in enumerate(self.kinds[1:], start=1):
            first, end = begins[state], begins[state + 1]
            if first < end:
                candidates = tables.take(sources[first:end], axis=0)
                candidates += errors[first:end]
                cells, earlier = before[kind]
                tables[state][cells] = np.minimum.reduce(candidates).take(earlier)
        return tables

    def trace(self, tables: Array, factor: float, counts: Index, cell: int) -> tuple[tuple[StepKind, ...], Array]:
        """The best path to the end with `counts[cell]` FULL and PARTIAL steps: its steps, and its errors `[2]`."""
        steps, total = [StepKind.REUSE] * self.num_steps, np.zeros(2)
        state = len(self.states) - 1
        while state:
            kind = self.kinds[state]
            if kind is not None:
                steps[self.states[state, -1]] = kind
            cells, earlier = _one_fewer(counts, kind)
            cell = int(earlier[cells == cell][0])
            runs = slice(self.begins[state], self.begins[state + 1])
            run = runs.start + int((tables[self.sources[runs], cell] + self.errors[runs] @ (1.0, factor)).argmin())
            state, total = int(self.sources[run]), total + self.errors[run]
        return (StepKind.FULL, *steps[1:]), total


def _one_fewer(counts: Index, kind: StepKind | None) -> tuple[Index, Index]:
    """The cells whose counts have a step of a kind, and the cells with one fewer; all and themselves for no kind."""
    if kind is None:
        return np.arange(len(counts)), np.arange(len(counts))
    places = np.zeros(counts.max(axis=0) + 1, int)
    places[tuple(counts.T)] = np.arange(len(counts))
    (cells,) = np.nonzero(counts[:, int(kind is StepKind.PARTIAL)])
    return cells, places[tuple((counts[cells] - (kind is StepKind.FULL, kind is StepKind.PARTIAL)).T)]


def _meet(runs: Sequence[_Runs], num_steps: int) -> tuple[Index, Index, Index, Array]:
    """The different states that runs lead to, how many lead to each, and the sources and errors of these."""
    states, sources, errors = (np.concatenate(parts) for parts in zip(*runs, strict=True))
    keys = (states - NONE) @ (num_steps + 2) ** np.arange(states.shape[1])[::-1]
    _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
    order = np.argsort(inverse, kind="stable")
    return states[first], counts, sources[order], errors[order]


def _leave(
    errors: ErrorModel, states: Index, number: int, num_steps: int, longest_run: int
) -> Iterator[tuple[int, _Runs]]:
    """Runs from the states of one step, numbered from `number`, by the step (or the end) where they stop."""
    last = int(states[0, -1])
    stops = np.arange(last + 1, min(last + longest_run + 1, num_steps - 1) + 1)
    num_computed = (states[:, 1:] != NONE).sum(axis=1)
    for length in np.unique(num_computed):
        (these,) = np.nonzero(num_computed == length)
        full, computed, sources = states[these, 0], states[these, -length:], number + these
        if stops.size:
            every = full.repeat(len(stops)), computed.repeat(len(stops), axis=0), np.tile(stops, len(these))
            to_full, to_partial = (found.reshape(len(these), len(stops), 2) for found in errors.runs(*every))
            allowed = np.isfinite(to_partial[..., 0])
        for place, stop in enumerate(stops.tolist()):
            recent = np.column_stack([states[these, 2:], np.full(len(these), stop)])
            yield stop, (np.column_stack([recent[:, -1], recent]), sources, to_full[:, place])
            kept = allowed[:, place]
            yield stop, (np.column_stack([full, recent])[kept], sources[kept], to_partial[kept, place])
        if last + longest_run >= num_steps - 1:
            end = np.full((len(these), states.shape[1]), num_steps)
            yield num_steps, (end, sources, errors.last_runs(full, computed))


def total_error(errors: ErrorModel, steps: Sequence[StepKind], order: int = 0) -> float:
    """The squared error of a schedule."""
    computed = [step for step, kind in enumerate(steps) if kind is not StepKind.REUSE]
    is_full = np.array([kind is StepKind.FULL for kind in steps])
    last_full = np.maximum.accumulate(np.where(is_full, np.arange(len(steps)), 0))
    points = [computed[max(0, place - order) : place + 1] for place in range(len(computed))]
    total = errors.last_runs(last_full[computed[-1:]], np.array(points[-1:]))[0].copy()
    for length in range(1, order + 2):
        runs = [run for run in zip(points[:-1], computed[1:], strict=True) if len(run[0]) == length]
        if runs:
            known, stops = np.array([run[0] for run in runs]), np.array([run[1] for run in runs])
            to_full, to_partial = errors.runs(last_full[known[:, -1]], known, stops)
            total += np.where(is_full[stops][:, None], to_full, to_partial).sum(axis=0)
    missed, off = total
    return float(missed + noise_factor(errors.correlation, steps.count(StepKind.PARTIAL)) * off)
