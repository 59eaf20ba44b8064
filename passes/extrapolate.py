"""Let the forms predict what a step does not compute, instead of repeating what was computed last.

Between steps the model's output moves on a smooth curve over the time of the flow. Each row of a cached output keeps
its last `order` values beside the latest one, and the times when all of them were computed; wherever a form reads a
cached output it gets the Lagrange polynomial through these points at the present time: order 0 repeats, order 1 is a
straight line. (TaylorSeer, arXiv 2503.06923, extrapolates features over the step number.)

=========  ==========================================================================
form       after the pass
=========  ==========================================================================
full       every row's values and times move down by one; the new ones go on top
partial    inactive rows are predicted; the values of active rows move down as in full
reuse      every row is predicted; nothing is written
=========  ==========================================================================

Rows have their own times because a partial step computes only some of them. A predicted value is never kept: errors
of a prediction would be extrapolated in their turn, and grow without bound. A step at the time of the last one (a
second-order solver, a test on frozen inputs) replaces it instead.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from .axis import Tokens
from .cache import CacheEntry
from .forms import Form
from .state import NEVER, Call, StateInputs, arithmetic_of, caller, latest_time, time_of

aten = torch.ops.aten
MAX_ORDER = 2


def extrapolate(form: Form, order: int, time_input: str | None = None) -> Form:
    """The form with its outputs predicted at order 0, 1 or 2.

    Args:
        form: functional, as `forms` writes it.
        order: degree of the polynomial; 0 changes nothing.
        time_input: the placeholder that holds the time of the step; by default the one called like `timestep`.

    Raises:
        UnsupportedGraphError: no input is the time.
    """
    if order == 0:
        return form
    graph = copy.deepcopy(form.module.graph)
    inputs = StateInputs(graph, form)
    outputs = [entry for entry in dict.fromkeys((*form.reads, *form.writes)) if entry.group == "output"]
    points = {entry: _points(inputs, entry, order) for entry in outputs}
    time = time_of(graph, form, time_input)
    call = caller(graph, "extrapolate")
    now = {entry: latest_time(call, time, arithmetic_of(entry)) for entry in outputs}
    if form.kind != "full":
        for entry in outputs:
            predict(call, entry, points[entry], now[entry])
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    computed = dict(zip(form.writes, results[len(results) - len(form.writes) :], strict=True))
    writes = dict(computed)
    for entry in outputs if form.writes else ():
        writes = {**push(graph, entry, points[entry], computed[entry], now[entry], form.kind), **writes}
        if form.kind == "partial" and entry.rows == "tokens":
            writes[entry] = _without_predictions(graph, computed[entry], points[entry].values[0])
    return inputs.finish(writes)


class Points:
    """The values of a cached output, latest first, and the times of its rows: `times` is `[order + 1, rows]`."""

    def __init__(self, values: list[Node], times: Node, kept: list[CacheEntry], times_entry: CacheEntry) -> None:
        self.values, self.times, self.kept, self.times_entry = values, times, kept, times_entry


def history_of(entry: CacheEntry, order: int) -> list[CacheEntry]:
    """The entries behind a cached output: `past_output.0.1` is what was computed one step earlier."""
    return [replace(entry, name=f"{entry.name}.{age}") for age in range(1, order + 1)]


def times_of(entry: CacheEntry, order: int) -> CacheEntry:
    """When each row's values were computed, latest first; `NEVER` where nothing was computed yet."""
    rows = entry.shape[entry.dim] if entry.rows == "tokens" else 1
    name, shape = f"{entry.name}.times", (order + 1, rows)
    return replace(
        entry, name=name, rows="none", dim=0, shape=shape, dtype=arithmetic_of(entry), tokens=Tokens(0), initial=NEVER
    )


def predict(call: Call, entry: CacheEntry, points: Points, now: Node) -> None:
    """Every reader of the cached output gets the polynomial's value at time `now`, row by row."""
    cached = points.values[0]
    readers = list(cached.users)
    shape = [1] * len(entry.shape)
    shape[entry.dim] = -1
    total = None
    for value, weight in zip(points.values, lagrange_weights(call, points, now), strict=True):
        weight = call(aten.view.default, weight, shape)
        term = call(aten.mul.Tensor, call(aten._to_copy.default, value, dtype=arithmetic_of(entry)), weight)
        # Memory that was never written may hold NaN, which a weight of 0 does not take away.
        term = call(aten.masked_fill.Scalar, term, call(aten.eq.Scalar, weight, 0), 0)
        total = term if total is None else call(aten.add.Tensor, total, term)
    assert total is not None
    prediction = call(aten._to_copy.default, total, dtype=entry.dtype)
    for reader in readers:
        reader.replace_input_with(cached, prediction)


def lagrange_weights(call: Call, points: Points, now: Node) -> list[Node]:
    """The weight `[rows]` of each value at time `now`. Values that were never computed count for nothing."""
    times = [call(aten.select.int, points.times, 0, i) for i in range(len(points.values))]
    known = [call(aten.gt.Scalar, time, 0.5 * NEVER) for time in times]
    one, zero = (call(aten.full_like.default, times[0], value) for value in (1.0, 0.0))
    weights = []
    for i, time in enumerate(times):
        weight = one
        for j, other in enumerate(times):
            if i != j:
                ahead, apart = call(aten.sub.Tensor, now, other), call(aten.sub.Tensor, time, other)
                factor = call(aten.mul.Tensor, weight, call(aten.div.Tensor, ahead, apart))
                weight = call(aten.where.self, known[j], factor, weight)
        weights.append(call(aten.where.self, known[i], weight, zero))
    return weights


def push(
    graph: Graph, entry: CacheEntry, points: Points, computed: Node, now: Node, kind: str
) -> dict[CacheEntry, Node]:
    """What history and times hold after the step: rows that it computed at a new time move down by one."""
    call = caller(graph, "extrapolate", graph.output_node())
    latest = call(aten.select.int, points.times, 0, 0)
    moves = call(aten.ne.Tensor, latest, now)
    if kind == "partial" and entry.rows == "tokens":
        index = computed.args[2]
        active = call(aten._to_copy.default, call(aten.ones_like.default, index), dtype=arithmetic_of(entry))
        active = call(aten.index_copy.default, call(aten.zeros_like.default, latest), 0, index, active)
        moves = call(aten.logical_and.default, moves, call(aten.ne.Scalar, active, 0))
    shape = [1] * len(entry.shape)
    shape[entry.dim] = -1
    by_row = call(aten.view.default, moves, shape)
    written = {
        kept: call(aten.where.self, by_row, newer, old)
        for kept, newer, old in zip(points.kept, points.values[:-1], points.values[1:], strict=True)
    }
    order = len(points.kept)
    top = call(aten.expand.default, call(aten.view.default, now, [1, 1]), [1, points.times_entry.shape[1]])
    moved = call(aten.cat.default, [top, call(aten.slice.Tensor, points.times, 0, 0, order)])
    written[points.times_entry] = call(aten.where.self, moves, moved, points.times)
    return written


def _without_predictions(graph: Graph, merged: Node, cached: Node) -> Node:
    """What a partial step keeps: its active rows in what was computed before."""
    assert merged.target is aten.index_copy.default
    _, dim, index, fresh = merged.args
    return caller(graph, "extrapolate", graph.output_node())(aten.index_copy.default, cached, dim, index, fresh)


def _points(inputs: StateInputs, entry: CacheEntry, order: int) -> Points:
    """The inputs that hold an output's values and times."""
    kept, times = history_of(entry, order), times_of(entry, order)
    return Points([inputs.read(e) for e in (entry, *kept)], inputs.read(times), kept, times)
