"""Let the forms predict what a step does not compute, instead of repeating what was computed last.

Between steps the model's output moves on a smooth curve over the time of the flow. Each row of a cached output keeps
its last `order` values beside the latest one, and the times when all of them were computed. Wherever a form reads a
cached output it gets the Lagrange polynomial through these points at the present time: order 0 repeats, order 1 is a
straight line (TaylorSeer, arXiv 2503.06923, extrapolates features over the step number). Or it gets what the plan's
weights make of the points (see `step_weights.blend`).

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

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ir.cache import CacheEntry
from ..ir.editor import FormEditor, FormPass
from ..ir.graphs import AddNode
from .history import Points, history_of, lagrange_weights, points_of, times_of, weighted_sum
from .step_weights import blend, only_moves_follow, take_weights
from .times import arithmetic_of, latest_time, time_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Extrapolate(FormPass):
    """Outputs predicted at order 1 or 2.

    Attributes:
        order: degree of the polynomial, and how many points are kept beside the latest.
        num_tokens: N.
        num_active: M.
        weighted: whether the form takes `step_weights`, for which the plan has to know what a step computes. It takes
            them only where nothing but moves comes after the last token.
        time_input: the placeholder that holds the time of the step; by default the one called like `timestep`.

    Raises:
        UnsupportedGraphError: no input is the time.
    """

    order: int
    num_tokens: int
    num_active: int
    weighted: bool = True
    time_input: str | None = None

    name = "extrapolate"

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        outputs = [entry for entry in entries if entry.group == "output"]
        added = (one for entry in outputs for one in (*history_of(entry, self.order), times_of(entry, self.order)))
        return (*entries, *added)

    def edit(self, form: FormEditor) -> None:
        """Keep the points of every output, and show what they predict."""
        outputs = [entry for entry in dict.fromkeys((*form.reads, *form.writes)) if entry.group == "output"]
        time = time_of(form, self.time_input)
        computed = form.writes
        weights = None
        if self.weighted and all(only_moves_follow(computed.get(e) or form.reads[e]) for e in outputs):
            weights = take_weights(form, self.order, self.num_tokens, self.num_active)
        call = form.at_start()
        points = {entry: points_of(form, entry, self.order) for entry in outputs}
        now = {entry: latest_time(call, time, arithmetic_of(entry), form.device) for entry in outputs}
        writes = dict(computed)
        for entry in outputs:
            known, fresh = points[entry], computed.get(entry)
            if weights is not None:
                after = call if fresh is None else form.after(fresh)
                source = known.values[0] if fresh is None else fresh
                others = set(form.graph.nodes)
                value = blend(after, entry, known, now[entry], weights, fresh, form.kind)
                _show(form, source, value, [user for user in source.users if user in others])
            elif form.kind != "full":
                predict(call, entry, known, now[entry])
                if fresh is not None and entry.rows == "tokens":
                    writes[entry] = _without_predictions(form, fresh, known.values[0])
            if fresh is not None:
                # History is stored first: it reads what the latest values are about to overwrite.
                writes = {**push(form, entry, known, fresh, now[entry]), **writes}
        form.writes = writes


def _show(form: FormEditor, source: Node, value: Node, readers: list[Node]) -> None:
    """Let readers, and the model's outputs, see `value` in place of `source`. The cache keeps what was computed."""
    for reader in readers:
        if reader.op != "output":
            reader.replace_input_with(source, value)
    form.outputs = [value if result is source else result for result in form.outputs]


def predict(call: AddNode, entry: CacheEntry, points: Points, now: Node) -> None:
    """Every reader of the cached output gets the polynomial's value at time `now`, row by row."""
    cached = points.values[0]
    readers = list(cached.users)
    weights = lagrange_weights(call, points, now)
    prediction = weighted_sum(call, entry, list(zip(points.values, weights, strict=True)))
    for reader in readers:
        reader.replace_input_with(cached, prediction)


def push(form: FormEditor, entry: CacheEntry, points: Points, computed: Node, now: Node) -> dict[CacheEntry, Node]:
    """What history and times hold after the step: rows that it computed at a new time move down by one."""
    call = form.at_end()
    latest = call(aten.select.int, points.times, 0, 0)
    moves = call(aten.ne.Tensor, latest, now)
    if form.kind == "partial" and entry.rows == "tokens":
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


def _without_predictions(form: FormEditor, merged: Node, cached: Node) -> Node:
    """What a partial step keeps: its active rows in what was computed before."""
    assert merged.target is aten.index_copy.default
    _, dim, index, fresh = merged.args
    return form.at_end()(aten.index_copy.default, cached, dim, index, fresh)
