"""The points of an extrapolation: what each row of a cached output was, and when."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..ir.axis import Tokens
from ..ir.cache import CacheEntry
from ..ir.editor import FormEditor
from ..ir.graphs import AddNode
from .times import NOT_COMPUTED, arithmetic_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Points:
    """The values of a cached output, latest first, and the times of its rows.

    Attributes:
        values: as many as the order of extrapolation and one.
        times: `[order + 1, rows]`.
        kept: the cache entries of all values but the latest.
        times_entry: the cache entry of the times.
    """

    values: list[Node]
    times: Node
    kept: list[CacheEntry]
    times_entry: CacheEntry

    @property
    def rows(self) -> int:
        """How many rows have times of their own."""
        return self.times_entry.shape[1]

    def time(self, call: AddNode, age: int) -> Node:
        """`[rows]`: when the value of this age was computed."""
        return call(aten.select.int, self.times, 0, age)

    def known(self, call: AddNode, age: int) -> Node:
        """Bool `[rows]`: whether there is a value of this age."""
        return call(aten.gt.Scalar, self.time(call, age), 0.5 * NOT_COMPUTED)


def points_of(form: FormEditor, entry: CacheEntry, order: int) -> Points:
    """The inputs that hold an output's values and times."""
    kept, times = history_of(entry, order), times_of(entry, order)
    return Points([form.read(e) for e in (entry, *kept)], form.read(times), kept, times)


def history_of(entry: CacheEntry, order: int) -> list[CacheEntry]:
    """The entries behind a cached output: `past_output.0.1` is what was computed one step earlier."""
    return [replace(entry, name=f"{entry.name}.{age}", role="older") for age in range(1, order + 1)]


def times_of(entry: CacheEntry, order: int) -> CacheEntry:
    """When each row's values were computed, latest first; `NOT_COMPUTED` where nothing was computed yet."""
    rows = entry.shape[entry.dim] if entry.rows == "tokens" else 1
    name, shape = f"{entry.name}.times", (order + 1, rows)
    return replace(
        entry, name=name, role="times", rows="none", dim=0, shape=shape, dtype=arithmetic_of(entry), tokens=Tokens(0),
        initial=NOT_COMPUTED,
    )  # fmt: skip


def lagrange_weights(call: AddNode, points: Points, now: Node) -> list[Node]:
    """The weight `[rows]` of each value at time `now`. Values that were never computed count for nothing."""
    ages = range(len(points.values))
    times, known = ([read(call, age) for age in ages] for read in (points.time, points.known))
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


def weighted_sum(call: AddNode, entry: CacheEntry, terms: list[tuple[Node, Node]]) -> Node:
    """The sum of `value * weight` over pairs of these, with weights `[rows]`, in the entry's type.

    Memory that was never written may hold NaN, which a weight of 0 does not take away: such a value counts as 0.
    """
    shape = [1] * len(entry.shape)
    shape[entry.dim] = -1
    total = None
    for value, weight in terms:
        by_row = call(aten.view.default, weight, shape)
        term = call(aten.mul.Tensor, call(aten._to_copy.default, value, dtype=arithmetic_of(entry)), by_row)
        term = call(aten.masked_fill.Scalar, term, call(aten.eq.Scalar, by_row, 0), 0)
        total = term if total is None else call(aten.add.Tensor, total, term)
    assert total is not None
    return call(aten._to_copy.default, total, dtype=entry.dtype)
