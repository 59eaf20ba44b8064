"""Rules of operators that move, split and join dims."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Node

from ..ir.axis import FREE, AxisState, Enter, Flow, Leave, OnGrid, Parts, Place, Resize, Tokens
from ..ir.refusal import shape_of
from .reshape import merge, move, split
from .rule import Query, Rule, align, grid_of, move_dims, position, works_along, wrap

aten = torch.ops.aten


def permute(q: Query) -> Flow | str:
    """`permute(x, dims)`."""
    operand, state = q.first()
    order = [wrap(d, len(shape_of(operand))) for d in q.arg(1, "dims")]
    return Flow(move_dims(state, order.index))


def transpose(q: Query) -> Flow | str:
    """`transpose(x, a, b)`; `t(x)` swaps the two dims of a matrix."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    a, b = (wrap(q.arg(i, f"dim{i - 1}", min(i, rank) - 1), rank) for i in (1, 2))
    return Flow(move_dims(state, lambda d: {a: b, b: a}.get(d, d)))


def unsqueeze(q: Query) -> Flow | str:
    """A new dim of size 1."""
    new = wrap(q.arg(1, "dim"), len(q.shape))
    return Flow(move_dims(q.first()[1], lambda d: d + (new <= d)))


def squeeze(q: Query) -> Flow | str:
    """Dims of size 1 go; a token axis of size 1 in a partial form must not go with them."""
    operand, state = q.first()
    shape = shape_of(operand)
    dims = q.arg(1, "dim")
    if dims is None:
        if isinstance(state, Tokens):
            return "it may drop the token axis when one token is active: name the dim to squeeze"
        dims = range(len(shape))
    named = [wrap(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)]
    if isinstance(state, Tokens) and state.dim in named:
        return "it squeezes the token axis"
    return works_along(state, {d for d in named if shape[d] == 1}, "", keeps_rank=False)


def reshape(q: Query) -> Flow | str:
    """`view`, `reshape`: where the token axis is born, renamed or ends.

    1. The token axis stays in one dim, folded with others or not: N in the new shape becomes M.
    2. The token axis is split into the grid: it ends.
    3. The factors of the grid become neighbours in one dim: the token axis is born there.
    4. Factors of the grid that stay apart move along.
    """
    operand, state = q.first()
    old, new = shape_of(operand), q.shape
    if 0 in old or not isinstance(state, Tokens | OnGrid):
        return Flow(FREE)
    if isinstance(state, Tokens):
        place = move(Place(state.dim, state.outer, state.inner), old, new)
        if place is not None:  # case 1
            tokens = Tokens(place.dim, state.whole, place.outer, place.inner)
            return Flow(tokens, (Resize(1, place.dim, tokens),))
        factors = split(Place(state.dim, state.outer, state.inner), q.grid_sizes)
        moved = _move_all(factors, old, new) if state.whole == (0, 0) else None
        if moved is None:
            return f"it mixes the token axis with other dims: {old} -> {new}"
        return Flow(grid_of([moved]), (Leave(operand, state),))  # case 2
    guesses = [g for guess in state.guesses if (g := _move_all(guess, old, new)) is not None]
    for guess in sorted(guesses, key=str):
        place = merge(guess, q.grid_sizes)
        if place is not None:  # case 3
            tokens = Tokens(place.dim, outer=place.outer, inner=place.inner)
            return Flow(tokens, (Enter(tokens),))
    return Flow(grid_of(guesses))  # case 4


def _move_all(guess: tuple[Place, ...], old: tuple[int, ...], new: tuple[int, ...]) -> tuple[Place, ...] | None:
    moved = [move(place, old, new) for place in guess]
    return None if None in moved else tuple(place for place in moved if place is not None)


def expand(q: Query) -> Flow | str:
    """`expand(x, sizes)`: dims are added on the left; a token axis keeps its size."""
    operand, state = q.first()
    shift = len(q.shape) - len(shape_of(operand))
    state = move_dims(state, lambda d: d + shift)
    return Flow(state, (Resize(1, state.dim, state),) if isinstance(state, Tokens) else ())


def repeat(q: Query) -> Flow | str:
    """`repeat(x, times)`: the token axis becomes the inner factor of its dim."""
    operand, state = q.first()
    times = q.arg(1, "repeats")
    shift = len(times) - len(shape_of(operand))
    if isinstance(state, Tokens):
        dim = state.dim + shift
        return Flow(Tokens(dim, state.whole, times[dim] * state.outer, state.inner))
    return works_along(move_dims(state, lambda d: d + shift), {d for d, count in enumerate(times) if count != 1}, "")


def repeat_interleave(q: Query) -> Flow | str:
    """`repeat_interleave(x, times, dim)`: the token axis becomes the outer factor of its dim."""
    operand, state = q.first()
    dim = q.arg(2, "dim")
    if dim is None:
        return "it flattens the token axis"
    dim = wrap(dim, len(shape_of(operand)))
    if isinstance(state, Tokens) and state.dim == dim:
        return Flow(Tokens(dim, state.whole, state.outer, state.inner * q.arg(1, "repeats")))
    return works_along(state, {dim}, "")


def concatenate(q: Query) -> Flow | str:
    """`cat`: along any other dim row by row, along the token axis one after the other."""
    operands = [o for o in q.arg(0, "tensors") if isinstance(o, Node)]
    rank = len(q.shape)
    dim = wrap(q.arg(1, "dim", 0), rank)
    if any(isinstance(s := q.state(o), Tokens) and s.dim == dim for o in operands):
        return _join(q, operands, dim)
    return align(q, operands, rank, own_dims=(dim,))


def _join(q: Query, operands: list[Node], dim: int) -> Flow | str:
    """Tokens and whole rows one after the other: `[L]` and `[0, N, 0]` make `[L, N, 0]`."""
    whole = [0]
    for operand in operands:
        state = q.state(operand)
        if isinstance(state, Tokens) and (state.dim != dim or state.folds != 1):
            return "its operands have different token axes"
        first, *rest = state.whole if isinstance(state, Tokens) else (shape_of(operand)[dim],)
        whole[-1] += first
        whole.extend(rest)
    return Flow(Tokens(dim, tuple(whole)))


def pad(q: Query) -> Flow | str:
    """`pad`: rows of a constant before and after the tokens are whole rows."""
    _, state = q.first()
    amounts, rank = q.arg(1, "pad"), len(q.shape)
    padded = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount}
    if q.node.target is aten.pad.default and q.arg(2, "mode", "constant") != "constant":
        return works_along(state, padded, "it repeats rows of the token axis")
    if not isinstance(state, Tokens) or state.dim not in padded:
        return works_along(state, padded, "")
    position = 2 * (rank - 1 - state.dim)
    before, after = amounts[position : position + 2]
    if state.folds != 1 or before < 0 or after < 0:
        return "it cuts the token axis"
    first, *middle = state.whole
    whole = [first + before, *middle]
    whole[-1] += after
    return Flow(Tokens(state.dim, tuple(whole)))


def stack_padded(q: Query) -> Flow | str:
    """`pad_sequence(tensors, batch_first)`: where all have one length it stacks them."""
    operands = [o for o in q.arg(0, "sequences") if isinstance(o, Node)]
    if not q.arg(1, "batch_first", False) or len({shape_of(o) for o in operands}) > 1:
        return "it stacks tensors of several lengths"
    flow = align(q, operands, len(q.shape) - 1)
    return flow if isinstance(flow, str) else Flow(move_dims(flow.state, lambda d: d + 1), flow.edits)


def stack(q: Query) -> Flow | str:
    """`stack` puts a new dim in front of or behind the token axis."""
    operands = [o for o in q.arg(0, "tensors") if isinstance(o, Node)]
    flow = align(q, operands, len(q.shape) - 1)
    if isinstance(flow, str):
        return flow
    new = wrap(q.arg(1, "dim", 0), len(q.shape))
    return Flow(move_dims(flow.state, lambda d: d + (new <= d)), flow.edits)


def cut(tokens: Tokens, start: int, end: int, num_tokens: int) -> AxisState | None:
    """The rows from `start` to `end` (full form) of a token axis that is not folded; `None` if a run is cut."""
    whole, position, is_run = [0], 0, False
    for length in [part for rows in tokens.whole for part in (rows, num_tokens)][:-1]:
        taken = max(0, min(end, position + length) - max(start, position))
        position += length
        if not is_run:
            whole[-1] += taken
        elif taken == num_tokens:
            whole.append(0)
        elif taken:
            return None
        is_run = not is_run
    return Tokens(tokens.dim, tuple(whole)) if len(whole) > 1 else FREE


def slices(q: Query) -> Flow | str:
    """`slice(x, dim, start, end, step)`: rows of a token axis may be taken in whole runs."""
    operand, state = q.first()
    shape = shape_of(operand)
    dim = wrap(q.arg(1, "dim", 0), len(shape))
    if not isinstance(state, Tokens) or state.dim != dim:
        return works_along(state, {dim}, "")
    size = shape[dim]
    start, end = (position(q.arg(i, n), size, d) for i, n, d in ((2, "start", 0), (3, "end", size)))
    taken = cut(state, start, end, q.num_tokens) if state.folds == 1 and q.arg(4, "step", 1) == 1 else None
    if taken is None:
        return "it cuts the token axis"
    edits = [Resize(i, None, rows_before(state, p, q)) for i, p in ((2, start), (3, end)) if i < len(q.node.args)]
    return Flow(taken, tuple(edits))


def rows_before(tokens: Tokens, position: int, q: Query) -> Tokens:
    """The rows before a place in the dim, to be counted."""
    rows = cut(tokens, 0, position, q.num_tokens)
    return rows if isinstance(rows, Tokens) else Tokens(tokens.dim, (position,))


def pieces(q: Query) -> Flow | str:
    """`split` and `chunk`: along the token axis only where the sizes are given and no run is cut."""
    operand, state = q.first()
    dim = wrap(q.arg(2, "dim", 0), len(shape_of(operand)))
    if not isinstance(state, Tokens) or state.dim != dim:
        return works_along(state, {dim}, "")
    if q.node.target is aten.split.Tensor:
        return _runs(q, state, shape_of(operand)[dim])
    if q.node.target is not aten.split_with_sizes.default or state.folds != 1:
        return "it cuts the token axis"
    sizes, states, edits, position = q.arg(1, "split_sizes"), [], [], 0
    for number, size in enumerate(sizes):
        part = cut(state, position, position + size, q.num_tokens)
        if part is None:
            return "it cuts the token axis"
        states.append(part)
        if isinstance(part, Tokens):
            edits.append(Resize(1, number, part))
        position += size
    return Flow(Parts(tuple(states)), tuple(edits))


def _runs(q: Query, tokens: Tokens, size: int) -> Flow | str:
    """`split(x, length)` along the token axis: into pieces that hold the same whole runs."""
    length = q.arg(1, "split_size")
    starts = range(0, size, length)
    parts = [cut(tokens, start, start + length, q.num_tokens) for start in starts] if tokens.folds == 1 else [None]
    first = parts[0]
    if not isinstance(first, Tokens) or any(part != first for part in parts) or size % length:
        return "it cuts the token axis"
    return Flow(Parts(tuple(parts)), (Resize(1, None, first),))  # type: ignore[arg-type]


def getitem(q: Query) -> Flow | str:
    """One of several results."""
    state = q.first()[1]
    return Flow(state.states[q.node.args[1]] if isinstance(state, Parts) else state)  # type: ignore[index]


def remove_dim(q: Query) -> Flow | str:
    """`select` and `unbind` remove one dim; a row that is no token may be selected from a token axis."""
    operand, state = q.first()
    shape = shape_of(operand)
    dim = wrap(q.arg(1, "dim", 0), len(shape))
    if isinstance(state, Tokens) and state.dim == dim and q.node.target is aten.select.int and state.folds == 1:
        index = wrap(q.arg(2, "index"), shape[dim])
        if cut(state, index, index + 1, q.num_tokens) == FREE:
            return Flow(FREE, (Resize(2, None, rows_before(state, index, q)),))
    return works_along(state, {dim}, "it cuts the token axis", keeps_rank=False)


def outer_product(q: Query) -> Flow | str:
    """`outer(a, b)` of two vectors."""
    states = [q.state(a) for a in q.node.args[:2]]
    tokens = [isinstance(state, Tokens) for state in states]
    if all(tokens):
        return "each token meets each other token"
    return Flow(move_dims(states[0], lambda d: d) if tokens[0] else move_dims(states[1], lambda d: 1))


def as_complex(q: Query) -> Flow | str:
    """`view_as_complex` takes the last dim, of size 2, away."""
    operand, state = q.first()
    return works_along(state, {len(shape_of(operand)) - 1}, "its complex numbers lie along the token axis", False)


def as_real(q: Query) -> Flow | str:
    """`view_as_real` adds a last dim of size 2."""
    return Flow(move_dims(q.first()[1], lambda d: d))


RULES: dict[Any, Rule] = {
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.reshape.default: reshape,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    aten.unsqueeze.default: unsqueeze,
    aten.squeeze.dim: squeeze,
    aten.squeeze.dims: squeeze,
    aten.squeeze.default: squeeze,
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.repeat_interleave.self_int: repeat_interleave,
    aten.view_as_complex.default: as_complex,
    aten.view_as_real.default: as_real,
    aten.cat.default: concatenate,
    aten.concat.default: concatenate,
    aten.stack.default: stack,
    aten.outer.default: outer_product,
    aten.pad_sequence.default: stack_padded,
    aten.constant_pad_nd.default: pad,
    aten.pad.default: pad,
    aten.split.Tensor: pieces,
    aten.split_with_sizes.default: pieces,
    aten.chunk.default: pieces,
    aten.slice.Tensor: slices,
    aten.select.int: remove_dim,
    aten.unbind.int: remove_dim,
    operator.getitem: getitem,
}
