"""Outputs as the plan weighs them: a linear multistep method with weights for each step, as data.

A step's output is `w[0] * fresh + w[1] * latest + w[2] * older ...`, row by row, where `fresh` is what the step
computes and the rest are the points of the cache. The weights are the form's input `step_weights`, `[2, order + 2]`:
row 0 for inactive tokens, row 1 for active ones. In a step that computes nothing they predict; in one that computes
they may also correct what predictions before it got wrong (`hetcache_compile/calibration/output_weights.py` makes
them).

Zeros say that the step goes by its time (see `history.lagrange_weights`), with computed rows as they are. So does a row
whose points are not all there, and a step at the time of the last one, which must not be corrected twice.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ir.cache import CacheEntry
from ..ir.contract import ACTIVE, INACTIVE, STEP_WEIGHTS
from ..ir.editor import FormEditor
from ..ir.graphs import AddNode
from ..ir.indices import mask_of, rows_of
from .history import Points, lagrange_weights, weighted_sum
from .times import arithmetic_of

aten = torch.ops.aten
MOVES = frozenset(
    (
        aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.permute.default, aten.transpose.int,
        aten.t.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
        aten.select.int, aten.clone.default, aten._to_copy.default, aten.expand.default, aten.split.Tensor,
        aten.split_with_sizes.default, aten.unbind.int, operator.getitem,
    )
)  # fmt: skip
"""Operators that only put values elsewhere: what is linear in a token tensor is linear behind them."""


@dataclass(frozen=True)
class StepWeights:
    """The inputs that a weighted form takes beside its points: the weights, and N with the active ones of them.

    `active` is int64 `[M]`, `active_index`, in a partial form. The others do not know M: theirs is bool `[N]`,
    `active_mask`.
    """

    table: Node
    active: Node
    num_tokens: int


def take_weights(form: FormEditor, order: int, num_tokens: int, num_active: int) -> StepWeights:
    """Let the form take `step_weights`, and which tokens are active if it does not yet."""
    if form.kind == "partial":
        active = form.index("active_index", (num_active,), torch.int64)
    else:
        active = form.index("active_mask", (num_tokens,), torch.bool)
    return StepWeights(form.index(STEP_WEIGHTS, (2, order + 2), torch.float32), active, num_tokens)


def only_moves_follow(node: Node) -> bool:
    """Whether all that becomes of a node's value, up to the model's outputs, is that it is put elsewhere."""
    return all(user.op == "output" or (user.target in MOVES and only_moves_follow(user)) for user in node.users)


def blend(
    call: AddNode, entry: CacheEntry, points: Points, now: Node, weights: StepWeights, computed: Node | None, kind: str
) -> Node:
    """What everything behind a cached output should see in place of it: the weighted sum.

    Args:
        call: adds operators to the graph, behind `computed`.
        entry: the cached output.
        points: its values and times, before this step.
        now: `[1]`, the time of this step.
        weights: of this step.
        computed: all rows as they are after the step: fresh ones, in a partial step beside cached ones. None if the
            step computes nothing.
        kind: of the form.
    """
    active = _active_rows(call, entry, points, weights)
    table = call(aten._to_copy.default, weights.table, dtype=arithmetic_of(entry))
    planned = [_by_row(call, table, column, active) for column in range(len(points.values) + 1)]
    # Without a plan: computed rows as they are, others by the times.
    fresh = active if kind == "partial" else call(aten.full_like.default, active, kind == "full")
    zero = call(aten.zeros_like.default, points.time(call, 0))
    usual = [call(aten._to_copy.default, fresh, dtype=arithmetic_of(entry))]
    usual += [call(aten.where.self, fresh, zero, weight) for weight in lagrange_weights(call, points, now)]
    follows = _follows_plan(call, points, now, planned)
    final = [call(aten.where.self, follows, *pair) for pair in zip(planned, usual, strict=True)]
    values = [*([] if computed is None else [computed]), *points.values]
    return weighted_sum(call, entry, list(zip(values, final[len(final) - len(values) :], strict=True)))


def _active_rows(call: AddNode, entry: CacheEntry, points: Points, weights: StepWeights) -> Node:
    """Bool `[rows]`: active tokens, and rows that are no tokens, which all computed steps compute."""
    zeros = call(aten.zeros_like.default, points.time(call, 0))
    if entry.rows != "tokens":
        return call(aten.eq.Scalar, zeros, 0)
    device = weights.table.meta["val"].device
    if weights.active.meta["val"].dtype == torch.bool:
        return mask_of(entry.tokens, weights.active, call)
    index = rows_of(entry.tokens, weights.active, weights.num_tokens, device, call)
    ones = call(aten._to_copy.default, call(aten.ones_like.default, index), dtype=arithmetic_of(entry))
    return call(aten.ne.Scalar, call(aten.index_copy.default, zeros, 0, index, ones), 0)


def _by_row(call: AddNode, table: Node, column: int, active: Node) -> Node:
    """`[rows]`: one weight of the plan, of the kind that each row is of."""
    of_kind = call(aten.select.int, table, 1, column)
    pair = [call(aten.select.int, of_kind, 0, kind) for kind in (ACTIVE, INACTIVE)]
    return call(aten.where.self, active, *pair)


def _follows_plan(call: AddNode, points: Points, now: Node, planned: list[Node]) -> Node:
    """Bool `[rows]`: the plan has weights for this step, the points that they need are there, and time moved on."""
    nonzero = [call(aten.ne.Scalar, weight, 0) for weight in planned]
    some = nonzero[0]
    for weighs in nonzero[1:]:
        some = call(aten.logical_or.default, some, weighs)
    follows = call(aten.logical_and.default, some, call(aten.ne.Tensor, points.time(call, 0), now))
    for age, weighs in enumerate(nonzero[1:]):
        enough = call(aten.logical_or.default, points.known(call, age), call(aten.logical_not.default, weighs))
        follows = call(aten.logical_and.default, follows, enough)
    return follows
