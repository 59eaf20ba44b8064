"""One rule per operator family: where does the token axis go, and what must a partial form edit?

A rule takes a `Query` and returns a `Flow`, or a string that says why the operator cannot be computed on the active
tokens alone; then it is computed whole, on operands whose inactive rows come from the cache. Rules are asked only
about nodes that touch a token axis, or that may give birth to one; any other node is computed whole and needs no
rule. To add an operator, find its family in `RULES` at the end of this file (or of `dims`, `indexing`, `attention`),
and give the oracle a sample in `samples`. Operators that a library brings along stand in `quantised`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from ..ir.axis import FREE, Flow, Never, Tokens
from ..ir.refusal import shape_of
from . import attention, dims, indexing, quantised
from .patches import CONVOLUTIONS, convolution
from .rule import Query, Rule, align, move_dims, works_along, wrap

aten = torch.ops.aten


def elementwise(q: Query) -> Flow | str:
    """Pointwise operators with broadcasting."""
    return align(q, list(dict.fromkeys(q.node.all_input_nodes)), len(q.shape))


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
    normalised = set(range(rank - len(q.arg(1, "normalized_shape")), rank))
    if isinstance(state, Tokens):
        return works_along(state, normalised, "it normalises over the token axis")
    return Flow(state)


def group_norm(q: Query) -> Flow | str:
    """`group_norm(x [B, C, *])` takes statistics over every dim after the first."""
    _, state = q.first()
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weights carry the token axis"
    return "it normalises over the token axis" if isinstance(state, Tokens) and state.dim > 0 else Flow(state)


def pooling(q: Query) -> Flow | str:
    """`max_pool3d(x, kernel)` and its like: along the last dims, as many as the kernel has."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    return works_along(state, set(range(rank - POOLS[q.node.target], rank)), "it pools over the token axis")


def linear(q: Query) -> Flow | str:
    """`x @ weight.T + bias`: the token axis may be any but the last dim of x."""
    operand, state = q.first()
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weight carries the token axis"
    return works_along(state, {len(shape_of(operand)) - 1}, "it contracts the token axis")


def lookup(q: Query) -> Flow | str:
    """`embedding(table, index)` adds a last dim to the index."""
    table, index = q.node.args[:2]
    if isinstance(q.state(table), Tokens):
        return "its table carries the token axis"
    return Flow(move_dims(q.state(index), lambda d: d))


def reduction(q: Query) -> Flow | str:
    """Sums, means, maxima over some dims."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    chosen = q.arg(1, "dim")
    if chosen is None or chosen == []:
        chosen = list(range(rank))
    reduced = {wrap(d, rank) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    return works_along(state, reduced, "it reduces over the token axis", keeps_rank=len(q.shape) == rank)


def norm(q: Query) -> Flow | str:
    """`linalg_vector_norm(x, ord, dim)`."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    chosen = q.arg(2, "dim")
    reduced = {wrap(d, rank) for d in (range(rank) if chosen is None else chosen)}
    return works_along(state, reduced, "it reduces over the token axis", keeps_rank=len(q.shape) == rank)


def along_dim(q: Query) -> Flow | str:
    """Operators that mix what lies along the dims in their second argument and keep every dim."""
    operand, state = q.first()
    chosen = q.arg(1, "dim", -1)
    rank = len(shape_of(operand))
    mixed = {wrap(d, rank) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    return works_along(state, mixed, "it mixes the rows of the token axis")


def largest(q: Query) -> Flow | str:
    """`topk(x, k, dim)` and `sort(x, dim)`: values and their places along one dim."""
    operand, state = q.first()
    position = 2 if q.node.target is aten.topk.default else 1
    return works_along(
        state, {wrap(q.arg(position, "dim", -1), len(shape_of(operand)))}, "it mixes the rows of the token axis"
    )


def roll(q: Query) -> Flow | str:
    """`roll(x, shifts, dims)`; without dims it rolls the flat tensor."""
    operand, state = q.first()
    rank = len(shape_of(operand))
    rolled = {wrap(d, rank) for d in q.arg(2, "dims", ())} or set(range(rank))
    return works_along(state, rolled, "it mixes the rows of the token axis")


def dropout(q: Query) -> Flow | Never:
    """Dropout that is switched off."""
    if q.arg(2, "train", True) and q.arg(1, "p") > 0:
        return Never("it drops elements at random", help="call model.eval() first")
    return Flow(q.first()[1])


ELEMENTWISE = (
    # arithmetic
    aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.mul.Tensor,
    aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor,
    aten.pow.Scalar, aten.addcmul.default, aten.lerp.Tensor, aten.neg.default, aten.abs.default,
    aten.reciprocal.default, aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other,
    aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.remainder.Scalar, aten.remainder.Tensor,
    aten.div.Tensor_mode, aten.div.Scalar_mode, aten.floor.default, aten.ceil.default, aten.round.default,
    aten.sign.default,
    # functions
    aten.exp.default, aten.log.default, aten.sin.default, aten.cos.default, aten.tanh.default, aten.erf.default,
    aten.sigmoid.default, aten.sqrt.default, aten.rsqrt.default, aten.relu.default, aten.silu.default,
    aten.gelu.default, aten.softplus.default, aten.leaky_relu.default, aten.hardtanh.default, aten.elu.default,
    aten.mish.default, aten.hardswish.default, aten.hardsigmoid.default, aten.log_sigmoid.default,
    aten.exp2.default, aten.log1p.default, aten.expm1.default, aten.square.default,
    # complex numbers
    aten.polar.default, aten.complex.default, aten.real.default, aten.imag.default, aten._conj.default,
    # choice, copies and types
    aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.masked_fill.Scalar,
    aten.masked_fill.Tensor, aten.nan_to_num.default, aten.copy.default, aten.clone.default,
    aten._to_copy.default, aten.contiguous.default, aten.alias.default, aten.detach.default, aten.to.dtype,
    # comparison
    aten.eq.Tensor, aten.ne.Tensor, aten.lt.Tensor, aten.le.Tensor, aten.gt.Tensor, aten.ge.Tensor,
    aten.eq.Scalar, aten.ne.Scalar, aten.lt.Scalar, aten.le.Scalar, aten.gt.Scalar, aten.ge.Scalar,
    aten.logical_not.default, aten.logical_and.default, aten.logical_or.default, aten.bitwise_not.default,
    aten.bitwise_and.Tensor, aten.bitwise_or.Tensor, aten.__and__.Tensor, aten.__or__.Tensor,
    aten.isnan.default,
)  # fmt: skip

POOLS: dict[Any, int] = {
    aten.max_pool2d.default: 2,
    aten.avg_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool3d.default: 3,
}
"""Over how many dims each of them pools."""

RULES: dict[Any, Rule] = {
    **dict.fromkeys(ELEMENTWISE, elementwise),
    **dict.fromkeys(CONVOLUTIONS, convolution),
    **dims.RULES,
    **indexing.RULES,
    **attention.RULES,
    aten.dropout.default: dropout,
    aten.native_dropout.default: dropout,
    aten.type_as.default: like_first,
    aten.fill.Scalar: like_first,
    aten.fill.Tensor: like_first,
    aten.empty_like.default: like_first,
    aten.zeros_like.default: like_first,
    aten.ones_like.default: like_first,
    aten.full_like.default: like_first,
    aten.new_zeros.default: fresh,
    aten.new_ones.default: fresh,
    aten.new_empty.default: fresh,
    aten.new_full.default: fresh,
    # weights
    aten.linear.default: linear,
    aten.embedding.default: lookup,
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: layer_norm,
    aten.group_norm.default: group_norm,
    **dict.fromkeys(POOLS, pooling),
    # reductions
    aten.sum.dim_IntList: reduction,
    aten.mean.dim: reduction,
    aten.amax.default: reduction,
    aten.amin.default: reduction,
    aten.any.dim: reduction,
    aten.all.dim: reduction,
    aten.linalg_vector_norm.default: norm,
    # along a dim
    aten.softmax.int: along_dim,
    aten._softmax.default: along_dim,
    aten.cumsum.default: along_dim,
    aten.flip.default: along_dim,
    aten.roll.default: roll,
    aten.glu.default: along_dim,
    aten.topk.default: largest,
    aten.sort.default: largest,
}


def rule_of(op: Any) -> Rule | None:
    """The rule for what a node calls, or None."""
    known = RULES.get(op)
    if known is not None or not isinstance(op, OpOverload):
        return known
    return quantised.NAMED.get(op.name())  # type: ignore[no-untyped-call]


def register_attention(op: Any, rows: int) -> None:
    """Teach the analysis another attention operator: see `attention.attention_along`.

    Args:
        op: an `OpOverload`, such as `torch.ops.flash_attn._flash_attn_forward.default`.
        rows: the dim of queries, keys and values that counts tokens, from the right.
    """
    RULES[op] = attention.attention_along(rows)
