"""Let the forms predict what a step does not compute, instead of repeating what was computed last.

Between steps the model's output moves on a smooth curve over the time of the flow. Each row of a cached output keeps
its last `order` values beside the latest one, and the times when all of them were computed. Wherever a form reads a
cached output it gets the Lagrange polynomial through these points at the present time: order 0 repeats, order 1 is a
straight line (TaylorSeer, arXiv 2503.06923, extrapolates features over the step number). Or it gets what the plan's
weights make of the points (see `blend`).

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

import torch
from torch.fx import Graph, Node

from ..ir.cache import CacheEntry
from ..ir.form import Form
from .history import Points, lagrange_weights, points_of, weighted_sum
from .state import Call, StateInputs, arithmetic_of, caller, latest_time, time_of
from .step_weights import blend, only_moves_follow, take_weights

aten = torch.ops.aten


def extrapolate(
    form: Form, order: int, num_tokens: int, num_active: int, *, weighted: bool = True, time_input: str | None = None
) -> Form:
    """The form with its outputs predicted at order 0, 1 or 2.

    Args:
        form: functional, as `forms` writes it.
        order: degree of the polynomial, and how many points are kept beside the latest; 0 changes nothing.
        num_tokens: N.
        num_active: M.
        weighted: whether the form takes `step_weights`, for which the plan has to know what a step computes. It takes
            them only where nothing but moves comes after the last token.
        time_input: the placeholder that holds the time of the step; by default the one called like `timestep`.

    Raises:
        UnsupportedGraphError: no input is the time.
    """
    if order == 0:
        return form
    graph = copy.deepcopy(form.module.graph)
    outputs = [entry for entry in dict.fromkeys((*form.reads, *form.writes)) if entry.group == "output"]
    time = time_of(graph, form, time_input)
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    computed = dict(zip(form.writes, results[len(results) - len(form.writes) :], strict=True))
    weights = None
    if weighted and _can_weigh(graph, form, outputs, computed):
        form, weights = take_weights(graph, form, order, num_tokens, num_active)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    inputs = StateInputs(graph, form)
    points = {entry: points_of(inputs, entry, order) for entry in outputs}
    call = caller(graph, "extrapolate", first)
    now = {entry: latest_time(call, time, arithmetic_of(entry)) for entry in outputs}
    writes = dict(computed)
    for entry in outputs:
        known, fresh = points[entry], computed.get(entry)
        if weights is not None:
            after = call if fresh is None else caller(graph, "extrapolate", fresh.next)
            source = known.values[0] if fresh is None else fresh
            others = set(graph.nodes)
            value = blend(after, entry, known, now[entry], weights, fresh, form.kind)
            _show(graph, source, value, [user for user in source.users if user in others], len(form.writes))
        elif form.kind != "full":
            predict(call, entry, known, now[entry])
            if fresh is not None and entry.rows == "tokens":
                writes[entry] = _without_predictions(graph, fresh, known.values[0])
        if fresh is not None:
            writes = {**push(graph, entry, known, fresh, now[entry], form.kind), **writes}
    return inputs.finish(writes)


def _show(graph: Graph, source: Node, value: Node, readers: list[Node], num_writes: int) -> None:
    """Let readers, and the model's outputs, see `value` in place of `source`. The cache keeps what was computed."""
    for reader in readers:
        if reader.op != "output":
            reader.replace_input_with(source, value)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    number = len(results) - num_writes
    output.args = ((*(value if r is source else r for r in results[:number]), *results[number:]),)


def _can_weigh(graph: Graph, form: Form, outputs: list[CacheEntry], computed: dict[CacheEntry, Node]) -> bool:
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    reads = dict(zip(form.reads, placeholders[len(placeholders) - len(form.reads) :], strict=True))
    return all(only_moves_follow(computed.get(entry) or reads[entry]) for entry in outputs)


def predict(call: Call, entry: CacheEntry, points: Points, now: Node) -> None:
    """Every reader of the cached output gets the polynomial's value at time `now`, row by row."""
    cached = points.values[0]
    readers = list(cached.users)
    weights = lagrange_weights(call, points, now)
    prediction = weighted_sum(call, entry, list(zip(points.values, weights, strict=True)))
    for reader in readers:
        reader.replace_input_with(cached, prediction)


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
