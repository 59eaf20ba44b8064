"""Rules of operators that read or write entries by their place: at given indices, or in a slice."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ..ir.axis import Edit, Flow, Gather, Reborn, Resize, Tokens
from ..ir.refusal import shape_of
from .dims import cut, rows_before
from .rule import Query, Rule, align, move_dims, position, works_along, wrap

aten = torch.ops.aten


def take(q: Query) -> Flow | str:
    """`index_select(x, dim, index)` with a whole index, along any other dim."""
    operand, state = q.first()
    if isinstance(q.state(q.node.args[2]), Tokens):
        return "its index carries the token axis"
    return works_along(state, {wrap(q.arg(1, "dim"), len(shape_of(operand)))}, "it picks rows of the token axis")


def take_at(q: Query) -> Flow | str:
    """`x[:, index]`: one whole index along one dim."""
    _, state = q.first()
    indices = q.arg(1, "indices")
    used = [d for d, index in enumerate(indices) if index is not None]
    if len(used) != 1 or isinstance(q.state(indices[used[0]]), Tokens):
        return "its index carries the token axis" if len(used) == 1 else "it picks elements by several indices"
    dim, extra = used[0], len(shape_of(indices[used[0]])) - 1
    if isinstance(state, Tokens) and state.dim == dim:
        return "it picks rows of the token axis"
    flow = works_along(state, {dim}, "")
    assert isinstance(flow, Flow)
    return Flow(move_dims(flow.state, lambda d: d + extra * (d > dim)))


def put_at(q: Query) -> Flow | str:
    """`index_put(x, [.., index], values)`: one whole index along one dim, values with every dim of x."""
    base, values = (a for a in (q.node.args[0], q.node.args[2]) if isinstance(a, Node))
    indices = q.arg(1, "indices")
    used = [d for d, index in enumerate(indices) if index is not None]
    if len(used) != 1 or isinstance(q.state(indices[used[0]]), Tokens):
        return "it picks elements by several indices"
    if len(shape_of(indices[used[0]])) != 1 or len(shape_of(values)) != len(q.shape):
        return "it picks elements by several indices"
    flow = align(q, [base, values], len(q.shape), own_dims=(used[0],))
    return "it picks rows of the token axis" if flow == "it works along the token axis" else flow


def scatter_slice(q: Query) -> Flow | str:
    """`slice_scatter(self, src, dim, start, end)`: both have every dim; only `dim` differs in size."""
    base, source = (a for a in q.node.args[:2] if isinstance(a, Node))
    states = q.state(base), q.state(source)
    dim = wrap(q.arg(2, "dim", 0), len(q.shape))
    if not any(isinstance(state, Tokens) for state in states):
        return Flow(states[0])
    if any(isinstance(state, Tokens) and state.dim == dim for state in states):
        return _scatter_rows(q, base, source, dim)
    return align(q, [base, source], len(q.shape), own_dims=(dim,))


def _scatter_rows(q: Query, base: Node, source: Node, dim: int) -> Flow | str:
    """Rows of a token axis are overwritten, in whole runs: the parts before, in and behind must fit together."""
    size = q.shape[dim]
    start, end = (position(q.arg(i, n), size, d) for i, n, d in ((3, "start", 0), (4, "end", size)))
    outer, inner = q.state(base), q.state(source)
    if q.arg(5, "step", 1) != 1:
        return "it cuts the token axis"
    if not isinstance(outer, Tokens):
        assert isinstance(inner, Tokens)
        whole = (start + inner.whole[0], *inner.whole[1:-1], inner.whole[-1] + size - end)
        outer = Tokens(dim, whole, inner.outer, inner.inner)
    taken = cut(outer, start, end, q.num_tokens) if outer.dim == dim and outer.folds == 1 else None
    if taken is None or (isinstance(inner, Tokens) and inner != taken):
        return "it cuts the token axis"
    edits: list[Edit] = [
        Resize(i, None, rows_before(outer, p, q)) for i, p in ((3, start), (4, end)) if i < len(q.node.args)
    ]
    gathered = ((base, outer), (source, taken))
    edits += [Gather(o, t) for o, t in gathered if isinstance(t, Tokens) and not isinstance(q.state(o), Tokens)]
    return Flow(outer, tuple(edits))


def scatter_one(q: Query) -> Flow | str:
    """`select_scatter(self, src, dim, index)`: `src` lacks the dim."""
    base, source = (a for a in q.node.args[:2] if isinstance(a, Node))
    dim = wrap(q.arg(2, "dim"), len(q.shape))
    states = q.state(base), q.state(source)
    wide = move_dims(states[1], lambda d: d + (d >= dim))
    found = {state for state in (states[0], wide) if isinstance(state, Tokens)}
    if not found:
        return Flow(states[0])
    if len(found) > 1 or (tokens := found.pop()).dim == dim:
        return "it cuts the token axis"
    edits = []
    if not isinstance(states[0], Tokens):
        edits.append(Gather(base, tokens))
    if not isinstance(states[1], Tokens):
        edits.append(Gather(source, tokens.at(tokens.dim - (tokens.dim > dim))))
    return Flow(tokens, tuple(edits))


def gather(q: Query) -> Flow | str:
    """`gather(x, dim, index)`: along `dim` by the index, along any other dim entry by entry.

    1. The index carries tokens along `dim`, and x none: each row of it picks for itself.
    2. Tokens along any other dim.
    """
    base, index = (a for a in (q.node.args[0], q.arg(2, "index")) if isinstance(a, Node))
    dim, state = wrap(q.arg(1, "dim"), len(q.shape)), q.state(index)
    if isinstance(state, Tokens) and state.dim == dim:  # case 1
        return "it picks rows of the token axis" if isinstance(q.state(base), Tokens) else Flow(state)
    return _entry_by_entry(q, [base, index], dim, "it picks rows of the token axis")  # case 2


def scatter(q: Query) -> Flow | str | Reborn:
    """`scatter_add(x, dim, index, src)`, `scatter`, `index_add`, `index_copy`: into x along `dim`, by an index.

    1. Along any other dim entry by entry. The index of `index_add` and `index_copy` is a vector for all of them.
    2. Along the token axis of x, what is put there being whole: the result has the token axis of x.
    """
    base, dim = q.first()[0], wrap(q.arg(1, "dim"), len(q.shape))
    index, source = q.arg(2, "index"), q.arg(3, SOURCES[q.node.target])
    state, others = q.state(base), [o for o in (index, source) if isinstance(o, Node)]
    if isinstance(state, Tokens) and state.dim == dim:
        if any(isinstance(q.state(o), Tokens) for o in others):
            return "it picks rows of the token axis"
        return Reborn("it picks rows of the token axis", state)  # case 2
    if q.node.target in WITH_VECTOR:
        if isinstance(q.state(index), Tokens):
            return "its index carries the token axis"
        others.remove(index)
    return _entry_by_entry(q, [base, *others], dim, "it reduces over the token axis")


def _entry_by_entry(q: Query, operands: list[Node], dim: int, along: str) -> Flow | str:
    """Operands with the same dims, of which an operator works along one. A size of 1 does not broadcast."""
    states = [state for operand in operands if isinstance(state := q.state(operand), Tokens)]
    if any(state.dim == dim for state in states):
        return along
    sizes = {shape_of(operand)[state.dim] for state in states for operand in operands}
    return align(q, operands, len(q.shape), own_dims=(dim,)) if len(sizes) < 2 else "it cuts the token axis"


SOURCES: dict[Any, str] = {
    aten.scatter_add.default: "src",
    aten.scatter.src: "src",
    aten.scatter.value: "value",
    aten.index_add.default: "source",
    aten.index_copy.default: "source",
}
"""The name of what each of these operators puts into its first argument."""

WITH_VECTOR = (aten.index_add.default, aten.index_copy.default)

RULES: dict[Any, Rule] = {
    **dict.fromkeys(SOURCES, scatter),
    aten.gather.default: gather,
    aten.index_select.default: take,
    aten.index.Tensor: take_at,
    aten.index_put.default: put_at,
    aten.slice_scatter.default: scatter_slice,
    aten.select_scatter.default: scatter_one,
}
