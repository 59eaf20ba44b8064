"""One rule per operator family: where does the token axis go, and what must a partial form edit?

A rule takes a `Query` and returns a `Flow`, or a string that says why not. Rules are asked only about nodes that
touch a token axis, or that may give birth to one; any other node is computed whole and needs no rule. To add an
operator, find its family in `RULES` at the end of this file; the oracle in `tests/test_rules.py` then checks it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch.fx import Node

from .axis import FREE, Attend, AxisState, Edit, Enter, Flow, Free, Gather, Grid, Leave, Resize, Tokens
from .query import Query, Rule, align, wrap
from .refusal import shape_of
from .reshape import dim_groups

aten = torch.ops.aten


def elementwise(q: Query) -> Flow | str:
    """Pointwise operators with broadcasting."""
    return align(q, q.node.all_input_nodes, len(q.shape))


def like_first(q: Query) -> Flow | str:
    """Operators whose result has the shape of the first argument; of the others they read only the type."""
    return Flow(q.first()[1])


def fresh(q: Query) -> Flow | str:
    """`new_zeros` and its like: the result depends on no token and is made whole."""
    return Flow(FREE)


def layer_norm(q: Query) -> Flow | str:
    """Normalisation over the trailing dims, with token-free weights."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weights carry the token axis"
    if isinstance(state, Tokens) and state.dim >= rank - len(q.arg(1, "normalized_shape")):
        return "it normalises over the token axis"
    return Flow(state)


def group_norm(q: Query) -> Flow | str:
    """`group_norm(x [B, C, *])` takes statistics over every dim after the first."""
    _, state = q.first()
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weights carry the token axis"
    return "it normalises over the token axis" if isinstance(state, Tokens) and state.dim > 0 else Flow(state)


def linear(q: Query) -> Flow | str:
    """`x @ weight.T + bias`: the token axis may be any but the last dim of x."""
    operand, state = q.first()
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weight carries the token axis"
    if isinstance(state, Tokens) and state.dim == len(shape_of(operand)) - 1:
        return "it contracts the token axis"
    return Flow(state if isinstance(state, Tokens) else FREE)


def matmul(q: Query) -> Flow | str:
    """Matrix products with a token-free right side; `addmm` puts the bias first."""
    bias = [q.node.args[0]] if q.node.target is aten.addmm.default else []
    left, right = q.node.args[len(bias) : len(bias) + 2]
    assert isinstance(left, Node)
    state = q.state(left)
    if any(isinstance(q.state(a), Tokens) for a in [right, *bias]):
        return "its right side carries the token axis"
    if not isinstance(state, Tokens):
        return Flow(FREE)
    rank = len(shape_of(left))
    if state.dim == rank - 1:
        return "it contracts the token axis"
    if state.dim < rank - 2 and len(shape_of(right)) > 2:  # type: ignore[arg-type]
        return "its batch dims hold the token axis"
    if bias and len(shape_of(bias[0])) > 1:  # type: ignore[arg-type]
        return "its bias is a matrix"
    new_batch_dims = max(0, len(shape_of(right)) - rank)  # type: ignore[arg-type]
    return Flow(Tokens(state.dim + new_batch_dims))


def reduction(q: Query) -> Flow | str:
    """Sums, means, maxima over some dims; softmax along one (`_softmax` keeps every dim)."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    dims = q.arg(1, "dim")
    if dims is None or dims == []:
        dims = list(range(rank))
    reduced = {wrap(d, rank) for d in ([dims] if isinstance(dims, int) else dims)}
    if not isinstance(state, Tokens):
        return Flow(FREE)
    if state.dim in reduced:
        return "it reduces over the token axis"
    keeps_rank = len(q.shape) == rank
    return Flow(Tokens(state.dim if keeps_rank else state.dim - sum(d < state.dim for d in reduced)))


def concatenate(q: Query) -> Flow | str:
    """`cat` along any dim but the token axis."""
    operands = [o for o in q.arg(0, "tensors") if isinstance(o, Node)]
    rank = len(q.shape)
    flow = align(q, operands, rank, own_dims=(wrap(q.arg(1, "dim", 0), rank),))
    return "it concatenates along the token axis" if flow == "it works along the token axis" else flow


def stack(q: Query) -> Flow | str:
    """`stack` puts a new dim in front of or behind the token axis."""
    operands = [o for o in q.arg(0, "tensors") if isinstance(o, Node)]
    flow = align(q, operands, len(q.shape) - 1)
    if isinstance(flow, str) or not isinstance(flow.state, Tokens):
        return flow if isinstance(flow, str) else Flow(FREE)
    new = wrap(q.arg(1, "dim", 0), len(q.shape))
    return Flow(Tokens(flow.state.dim + (new <= flow.state.dim)), flow.edits)


def along_dim(q: Query) -> Flow | str:
    """Operators that split or cut along one dim (default 0) and keep every dim."""
    operand, state = q.first()
    position = 1 if q.node.target is aten.slice.Tensor else 2
    dim = wrap(q.arg(position, "dim", 0), len(shape_of(operand)))
    if isinstance(state, Tokens) and state.dim == dim:
        return "it cuts the token axis"
    return Flow(state if isinstance(state, Tokens) else FREE)


def remove_dim(q: Query) -> Flow | str:
    """`select` and `unbind` remove one dim."""
    operand, state = q.first()
    dim = wrap(q.arg(1, "dim", 0), len(shape_of(operand)))
    if not isinstance(state, Tokens):
        return Flow(FREE)
    if state.dim == dim:
        return "it cuts the token axis"
    return Flow(Tokens(state.dim - (dim < state.dim)))


def scatter_slice(q: Query) -> Flow | str:
    """`slice_scatter(self, src, dim)`: both have every dim; only `dim` differs in size."""
    operands = [a for a in q.node.args[:2] if isinstance(a, Node)]
    rank = len(q.shape)
    flow = align(q, operands, rank, own_dims=(wrap(q.arg(2, "dim", 0), rank),))
    return "it cuts the token axis" if flow == "it works along the token axis" else flow


def getitem(q: Query) -> Flow | str:
    """One of several results."""
    return like_first(q)


def move_dims(state: AxisState, new_place: Callable[[int], int]) -> Flow:
    """The flow of an operator that only moves dims: `new_place` maps old dims to new ones."""
    if isinstance(state, Tokens):
        return Flow(Tokens(new_place(state.dim)))
    if isinstance(state, Grid):
        return Flow(Grid(tuple(new_place(d) for d in state.dims)))
    return Flow(FREE)


def permute(q: Query) -> Flow | str:
    """`permute(x, dims)`."""
    operand, state = q.first()
    order = [wrap(d, len(shape_of(operand))) for d in q.arg(1, "dims")]
    return move_dims(state, order.index)


def transpose(q: Query) -> Flow | str:
    """`transpose(x, a, b)`; `t(x)` swaps the two dims of a matrix."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    a, b = (wrap(q.arg(i, f"dim{i - 1}", min(i, rank) - 1), rank) for i in (1, 2))
    return move_dims(state, lambda d: {a: b, b: a}.get(d, d))


def unsqueeze(q: Query) -> Flow | str:
    """A new dim of size 1."""
    new = wrap(q.arg(1, "dim"), len(q.shape))
    return move_dims(q.first()[1], lambda d: d + (new <= d))


def squeeze(q: Query) -> Flow | str:
    """Dims of size 1 go; a token axis of size 1 in a partial form must not go with them."""
    operand, state = q.first()
    shape = shape_of(operand)
    dims = q.arg(1, "dim")
    if dims is None:
        if isinstance(state, Tokens):
            return "it may drop the token axis when one token is active: name the dim to squeeze"
        return Flow(FREE)
    named = [wrap(d, len(shape)) for d in ([dims] if isinstance(dims, int) else dims)]
    if isinstance(state, Tokens) and state.dim in named:
        return "it squeezes the token axis"
    gone = [d for d in named if shape[d] == 1]
    return move_dims(state, lambda d: d - sum(g < d for g in gone))


def reshape(q: Query) -> Flow | str:
    """`view`, `reshape`: where the token axis is born, renamed or ends.

    1. All grid dims at their full sizes, and nothing else, become one dim: the token axis is born there.
    2. Grid dims that stay apart move along.
    3. The token axis stays one dim: N in the new shape becomes M.
    4. The token axis is split into exactly the grid: it ends.
    5. Anything else mixes the token axis with another dim and is refused.
    """
    operand, state = q.first()
    if isinstance(state, Free):
        return Flow(FREE)
    old, new = shape_of(operand), q.shape
    if 0 in old:
        return Flow(FREE)
    groups = dim_groups(old, new)
    if isinstance(state, Grid):
        whole = tuple(old[d] for d in state.dims) == q.grid_sizes
        merged = next((g for g in groups if g[0] == state.dims and len(g[1]) == 1), None)
        if whole and merged is not None:
            return Flow(Tokens(merged[1][0]), (Enter(merged[1][0]),))  # case 1
        places = {o[0]: n[0] for o, n in groups if len(o) == len(n) == 1}
        kept = all(d in places for d in state.dims)
        return Flow(Grid(tuple(places[d] for d in state.dims)) if kept else FREE)  # case 2
    assert isinstance(state, Tokens)
    group = next(g for g in groups if state.dim in g[0])
    if group[0] == (state.dim,):
        if len(group[1]) == 1:  # case 3
            place = group[1][0]
            return Flow(Tokens(place), (Resize(1, place),))
        if tuple(new[d] for d in group[1]) == q.grid_sizes:  # case 4
            return Flow(Grid(group[1]), (Leave(operand, state.dim),))
    return f"it mixes the token axis with other dims: {old} -> {new}"  # case 5


def expand(q: Query) -> Flow | str:
    """`expand(x, sizes)`: dims are added on the left; a token axis keeps its size."""
    operand, state = q.first()
    shift = len(q.shape) - len(shape_of(operand))
    if not isinstance(state, Tokens):
        return move_dims(state, lambda d: d + shift)
    return Flow(Tokens(state.dim + shift), (Resize(1, state.dim + shift),))


def repeat(q: Query) -> Flow | str:
    """`repeat(x, times)`: the token axis is repeated once."""
    operand, state = q.first()
    times = q.arg(1, "repeats")
    shift = len(times) - len(shape_of(operand))
    if isinstance(state, Tokens) and times[state.dim + shift] != 1:
        return "it repeats the token axis"
    return move_dims(state, lambda d: d + shift) if isinstance(state, Tokens) else Flow(FREE)


def patchify(q: Query) -> Flow | str:
    """A convolution whose kernel is its stride cuts the input into patches: its output is the token grid."""
    state = q.first()[1]
    if isinstance(state, Tokens):
        return "it convolves over the token axis"
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weight carries the token axis"
    spatial = q.shape[2:]
    if not is_patchify(q.node) or spatial != q.grid[3 - len(spatial) :] or prod(spatial) != q.num_tokens:
        return Flow(FREE)
    return Flow(Grid(tuple(d + 2 for d, size in enumerate(spatial) if size != 1)))


def is_patchify(node: Node) -> bool:
    """Whether a node is a convolution into patches that do not overlap."""
    if node.target not in (aten.conv3d.default, aten.conv2d.default, aten.convolution.default):
        return False
    weight = node.args[1]
    assert isinstance(weight, Node)
    kernel = list(shape_of(weight)[2:])
    stride = _argument(node, "stride", [1])
    padding, dilation = _argument(node, "padding", [0]), _argument(node, "dilation", [1])
    return (
        _spread(stride, len(kernel)) == kernel and set(_spread(padding, 1)) == {0} and set(_spread(dilation, 1)) == {1}
    )


def attention(q: Query) -> Flow | str:
    """Scaled dot-product attention, `[..., rows, features]`.

    1. Queries carry the token axis, keys and values do not: cross-attention, nothing to do.
    2. All three carry it as their rows: self-attention, the context comes from the cache.
    3. All three carry it as one batch dim: attention over something else, token by token.
    """
    query, key, value = q.node.args[:3]
    assert isinstance(query, Node)
    assert isinstance(key, Node)
    assert isinstance(value, Node)
    rank = len(q.shape)
    states = [q.state(query), q.state(key), q.state(value)]
    mask = q.arg(3, "attn_mask")
    tokens = [isinstance(s, Tokens) for s in states]
    if not any(tokens) and not isinstance(q.state(mask), Tokens):
        return Flow(FREE)
    if q.arg(4, "dropout_p", 0.0) or q.arg(5, "is_causal", False):
        return "attention with dropout or a causal mask depends on the rows that are left out"
    if isinstance(q.state(mask), Tokens):
        return "its mask is computed from tokens"
    if any(len(shape_of(operand)) != rank for operand in (query, key, value)):
        return "its queries, keys and values differ in their number of dims"
    if tokens == [True, False, False] and states[0] == Tokens(rank - 2):  # case 1
        edits: tuple[Edit, ...] = ()
        if isinstance(mask, Node) and len(shape_of(mask)) > 1 and shape_of(mask)[-2] != 1:
            edits = (Gather(mask, len(shape_of(mask)) - 2),)
        return Flow(Tokens(rank - 2), edits)
    if all(tokens) and len(set(states)) == 1:
        if mask is not None:
            return "self-attention over the token axis has a mask"
        if states[0] == Tokens(rank - 2):  # case 2
            return Flow(Tokens(rank - 2), (Attend(key, value, rank - 2),))
        if states[0] != Tokens(rank - 1):  # case 3
            return Flow(states[0])
    return "its queries, keys and values carry the token axis in different ways"


def _argument(node: Node, name: str, default: Any) -> Any:
    """An argument of an ATen operator by the name its schema gives it."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema  # type: ignore[union-attr]
    position = next((i for i, a in enumerate(schema.arguments) if a.name == name), len(node.args))
    return node.args[position] if position < len(node.args) else default


def _spread(sizes: Any, length: int) -> list[int]:
    """`[2]` or `2` means `[2, 2, 2]` to a convolution."""
    spread: list[int] = [sizes] if isinstance(sizes, int) else list(sizes)
    return spread * length if len(spread) == 1 else spread


ELEMENTWISE = (
    # arithmetic
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor,
    aten.addcmul.default, aten.lerp.Tensor, aten.neg.default, aten.abs.default, aten.reciprocal.default,
    aten.maximum.default, aten.minimum.default, aten.clamp.default, aten.clamp_min.default,
    # functions
    aten.exp.default, aten.log.default, aten.sin.default, aten.cos.default, aten.tanh.default,
    aten.sigmoid.default, aten.sqrt.default, aten.rsqrt.default, aten.relu.default, aten.silu.default,
    aten.gelu.default, aten.softplus.default, aten.leaky_relu.default, aten.hardtanh.default,
    # choice, copies and types
    aten.where.self, aten.copy.default, aten.clone.default, aten._to_copy.default, aten.contiguous.default,
    aten.alias.default, aten.detach.default, aten.to.dtype,
)  # fmt: skip

RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    aten.type_as.default: like_first,
    aten.empty_like.default: like_first,
    aten.zeros_like.default: like_first,
    aten.ones_like.default: like_first,
    aten.full_like.default: like_first,
    aten.new_zeros.default: fresh,
    aten.new_ones.default: fresh,
    aten.new_empty.default: fresh,
    aten.new_full.default: fresh,
    # products and norms
    aten.linear.default: linear,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: matmul,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: layer_norm,
    aten.group_norm.default: group_norm,
    aten.conv2d.default: patchify,
    aten.conv3d.default: patchify,
    aten.scaled_dot_product_attention.default: attention,
    # reductions
    aten.sum.dim_IntList: reduction,
    aten.mean.dim: reduction,
    aten.amax.default: reduction,
    aten.amin.default: reduction,
    aten.softmax.int: reduction,
    aten._softmax.default: reduction,
    # dims
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
    # pieces
    aten.cat.default: concatenate,
    aten.stack.default: stack,
    aten.split.Tensor: along_dim,
    aten.split_with_sizes.default: along_dim,
    aten.chunk.default: along_dim,
    aten.slice.Tensor: along_dim,
    aten.select.int: remove_dim,
    aten.unbind.int: remove_dim,
    aten.slice_scatter.default: scatter_slice,
    operator.getitem: getitem,
}
