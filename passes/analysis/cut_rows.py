"""Pieces of a token axis: cut apart, computed each in its own way, and put together again.

    first, others = x[:, :k], x[:, k:]
    x = torch.cat([first * scale_of_first + shift_of_first, others * scale + shift], dim=1)

The active tokens may lie in any piece, so a partial form has no static shape for one. But the rows are independent of
each other: each piece can be computed for all active rows, and each row be taken from the piece that it belongs to.
Where a piece is used in any other way, the slices that cut it are computed whole, like any operator that looks across
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Node

from ..ir.axis import AxisState, Flow, JoinPieces, Piece, Resize, Tokens, Uncut
from ..ir.refusal import shape_of
from ..rules.rule import Query, Rule, position, wrap

aten = torch.ops.aten


def cut_out(q: Query) -> Flow | None:
    """A slice with a step of 1 cuts a piece out of a token axis that is not folded."""
    if q.node.target is not aten.slice.Tensor:
        return None
    operand, state = q.first()
    if not isinstance(state, Tokens) or state.folds != 1:
        return None
    shape = shape_of(operand)
    dim = wrap(q.arg(1, "dim", 0), len(shape))
    if dim != state.dim or q.arg(4, "step", 1) != 1:
        return None
    start, end = (position(q.arg(i, n), shape[dim], d) for i, n, d in ((2, "start", 0), (3, "end", shape[dim])))
    return Flow(Piece(state, start, end, frozenset({q.node})), (Uncut(operand),))


def along_pieces(node: Node, states: Mapping[Node, AxisState], grid: tuple[int, int, int], rule: Rule) -> Flow | None:
    """The flow of a node that has pieces among its operands; `None` if it needs them whole.

    1. All pieces of a token axis, in order: the token axis.
    2. A rule that does the same to each row of a token axis, and to nothing else, does it to each row of a piece.
    """
    operands = node.all_input_nodes
    pieces = [state for operand in operands if isinstance(state := states[operand], Piece)]
    if any(isinstance(states[operand], Tokens) for operand in operands):
        return None
    if node.target is aten.cat.default and (joined := _joined(node, states, grid)) is not None:  # case 1
        return joined
    first, *others = pieces
    if any((p.tokens.at(0), p.start, p.end) != (first.tokens.at(0), first.start, first.end) for p in others):
        return None
    axes = {operand: states[operand] for operand in operands}
    axes |= {operand: state.tokens for operand, state in axes.items() if isinstance(state, Piece)}
    flow = rule(Query(node, axes, grid))  # case 2
    if not isinstance(flow, Flow) or not _same_rows(flow.state, first.tokens):
        return None
    if not all(isinstance(edit, Resize) and _same_rows(edit.tokens, first.tokens) for edit in flow.edits):
        return None
    assert isinstance(flow.state, Tokens)
    cuts = frozenset[Node]().union(*(piece.cuts for piece in pieces))
    return Flow(replace(first, tokens=flow.state, cuts=cuts), flow.edits)


def _same_rows(state: AxisState, tokens: Tokens) -> bool:
    return isinstance(state, Tokens) and state.at(0) == tokens.at(0)


def _joined(node: Node, states: Mapping[Node, AxisState], grid: tuple[int, int, int]) -> Flow | None:
    """All pieces of one token axis one after the other."""
    q = Query(node, states, grid)
    operands, dim = q.arg(0, "tensors"), wrap(q.arg(1, "dim", 0), len(q.shape))
    ends, tokens = [0], None
    for operand in operands:
        state = states[operand]
        if not isinstance(state, Piece) or state.tokens.dim != dim or state.start != ends[-1]:
            return None
        if tokens not in (None, state.tokens):
            return None
        tokens = state.tokens
        ends.append(state.end)
    if tokens is None or ends[-1] != tokens.size(q.num_tokens):
        return None
    return Flow(tokens, (JoinPieces(tuple(operands), tuple(ends[1:]), tokens),))
