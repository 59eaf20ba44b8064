"""Rules of the operators in which tokens meet: attention, and products that sum over the token axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from ..ir.axis import FREE, Accumulate, Attend, AxisState, Edit, Flow, Free, Gather, Never, Tokens
from ..ir.refusal import shape_of
from .rule import Query, Rule, align, move_dims

aten = torch.ops.aten


def attention(q: Query) -> Flow | str | Never:
    """Scaled dot-product attention, `[..., rows, features]`. Queries may be tokens, whole rows, or both.

    1. Keys and values carry no tokens: cross-attention, nothing to do.
    2. Both carry them as their rows: the context comes from the cache.
    3. All that have a batch dim carry it as that: attention over something else, token by token, each with its mask.
    """
    operands = [operand for operand in q.node.args[:3] if isinstance(operand, Node)]
    rank = len(q.shape)
    query, key, value = (q.state(operand) for operand in operands)
    mask = q.arg(3, "attn_mask")
    if not any(isinstance(state, Tokens) for state in (query, key, value, q.state(mask))):
        return Flow(FREE)
    if q.arg(4, "dropout_p", 0.0):
        return Never("it drops elements at random", help="call model.eval() first")
    if any(len(shape_of(operand)) != rank for operand in operands):
        return "its queries, keys and values differ in their number of dims"
    masks = [mask] if isinstance(mask, Node) else []
    batch = {state.dim - len(shape_of(o)) for o in (*operands, *masks) if isinstance(state := q.state(o), Tokens)}
    if min(batch) < -2:
        return align(q, [*operands, *masks], rank, (rank - 2, rank - 1))
    if q.arg(5, "is_causal", False):
        return "a causal mask depends on the rows that are left out"
    if isinstance(q.state(mask), Tokens):
        return "its mask is computed from tokens"
    if any(isinstance(state, Tokens) and state.dim == rank - 1 for state in (query, key, value)):
        return "its features lie along the token axis"
    edits: list[Edit] = []
    if isinstance(query, Tokens):
        edits.extend(_mask_rows(mask, query))
    if isinstance(key, Tokens) or isinstance(value, Tokens):
        if key != value:
            return "its keys and values carry the token axis in different ways"
        assert isinstance(key, Tokens)
        if key.folds != 1:
            return "its keys fold the token axis with another"
        edits.append(Attend(operands[1], operands[2], key, mask if _has_size(mask, 1) else None))
    return Flow(query if isinstance(query, Tokens) else FREE, tuple(edits))


def attention_along(rows: int) -> Rule:
    """A rule for another attention operator, `op(query, key, value, ...)` without masks, such as flash-attn's.

    Args:
        rows: the dim of queries, keys and values that counts tokens, from the right: -3 for
            `[batch, tokens, heads, features]`.
    """

    def rule(q: Query) -> Flow | str:
        operands = [operand for operand in q.node.args[:3] if isinstance(operand, Node)]
        query, key, value = (q.state(operand) for operand in operands)
        states = [state for state in (query, key, value) if isinstance(state, Tokens)]
        place = len(q.shape) + rows
        if not states or any(state.dim != place for state in states):
            return "it has tokens in other dims than its rows" if states else Flow(FREE)
        edits: list[Edit] = []
        if isinstance(key, Tokens) or isinstance(value, Tokens):
            if key != value or not isinstance(key, Tokens) or key.folds != 1:
                return "its keys and values carry the token axis in different ways"
            edits.append(Attend(operands[1], operands[2], key))
        return Flow(query if isinstance(query, Tokens) else FREE, tuple(edits))

    return rule


def queries_of_heads(node: Node, states: Mapping[Node, AxisState]) -> Tokens | Free | None:
    """How the rows of an attention's queries lie, if its heads (dim -3 of all operands) can be computed apart; or None.

    They can in scaled dot-product attention, if its mask is the same for all heads and queries.
    """
    if node.target is not aten.scaled_dot_product_attention.default:
        return None
    shapes = [shape_of(operand) for operand in node.args[:3] if isinstance(operand, Node)]
    query = states[node.all_input_nodes[0]]
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if len(shapes[0]) < 3 or _has_size(mask, 2) or _has_size(mask, 3):
        return None
    if len({shape[-3] for shape in shapes}) > 1 and not node.kwargs.get("enable_gqa"):
        return None
    if not isinstance(query, Tokens):
        return FREE
    return query if query.dim == len(shapes[0]) - 2 and query.folds == 1 else None


def _has_size(mask: Any, from_right: int) -> bool:
    """Whether a mask has a size other than 1 at a dim counted from the right."""
    shape = shape_of(mask) if isinstance(mask, Node) else ()
    return len(shape) >= from_right and shape[-from_right] != 1


def _mask_rows(mask: Any, query: Tokens) -> Sequence[Edit]:
    """A mask has a row for each query."""
    return [Gather(mask, query.at(len(shape_of(mask)) - 2))] if _has_size(mask, 2) else []


def matmul(q: Query) -> Flow | str:
    """Matrix products.

    1. Rows of the left or columns of the right side are tokens: so are those of the product.
    2. Both sides have the token axis in the middle: a sum over tokens, which adds up over parts.
    3. Both have it as a batch dim.
    """
    left, right = (operand for operand in q.node.args[:2] if isinstance(operand, Node))
    return _product(q, left, right)


def _product(q: Query, left: Node, right: Node) -> Flow | str:
    states = q.state(left), q.state(right)
    ranks = len(shape_of(left)), len(shape_of(right))
    if ranks[1] == 1 or ranks[0] == 1:
        return _vector_product(q, left, right)
    rank = max(ranks)
    rows, columns, shared = (
        isinstance(state, Tokens) and state.dim == r - back
        for state, r, back in ((states[0], ranks[0], 2), (states[1], ranks[1], 1), (states[0], ranks[0], 1))
    )
    if shared and isinstance(states[1], Tokens) and states[1].dim == ranks[1] - 2:  # case 2
        assert isinstance(states[0], Tokens)
        if states[0].at(0) != states[1].at(0) or states[0].folds != 1:
            return "it contracts the token axis"
        return Flow(FREE, (Accumulate(left, right, states[0], states[1]),))
    tokens = states[0] if isinstance(states[0], Tokens) else states[1]
    if not isinstance(tokens, Tokens):
        return Flow(FREE)
    if shared or (isinstance(states[1], Tokens) and states[1].dim == ranks[1] - 2):
        return "it contracts the token axis"
    if rows and columns:
        return "each token meets each other token"
    if rows or columns:  # case 1
        other = states[1] if rows else states[0]
        if isinstance(other, Tokens):
            return "its operands have different token axes"
        return Flow(tokens.at(rank - (2 if rows else 1)))
    return align(q, [left, right], rank, own_dims=(rank - 2, rank - 1))  # case 3


def _vector_product(q: Query, left: Node, right: Node) -> Flow | str:
    """A product with a token-free vector."""
    state = q.state(left)
    if isinstance(q.state(right), Tokens):
        return "its right side carries the token axis"
    if isinstance(state, Tokens) and state.dim == len(shape_of(left)) - 1:
        return "it contracts the token axis"
    return Flow(state if isinstance(state, Tokens) else FREE)


def einsum(q: Query) -> Flow | str:
    """`einsum(equation, operands)`: a letter names the token axis, or does not."""
    letters, result = q.node.args[0].replace(" ", "").split("->")  # type: ignore[union-attr]
    operands = list(zip(letters.split(","), q.node.args[1], strict=True))  # type: ignore[arg-type]
    if len(operands) == 1:
        word, state = operands[0][0], q.state(operands[0][1])
        lost = {d for d, letter in enumerate(word) if letter not in result or word.count(letter) > 1}
        if isinstance(state, Tokens) and state.dim in lost:
            return "it contracts the token axis"
        return Flow(move_dims(state, lambda d: None if d in lost else result.index(word[d])))
    found = {(word[s.dim], s.at(0)) for word, o in operands if isinstance(s := q.state(o), Tokens)}
    if not found:
        return Flow(FREE)
    if len(found) > 1:
        return "its operands have different token axes"
    letter, tokens = found.pop()
    if letter not in result:
        return "it contracts the token axis"
    meets = [(o, word.index(letter)) for word, o in operands if letter in word and not isinstance(q.state(o), Tokens)]
    gathers = [Gather(o, tokens.at(d)) for o, d in meets if shape_of(o)[d] != 1]
    return Flow(tokens.at(result.index(letter)), tuple(gathers))


def addmm(q: Query) -> Flow | str:
    """`bias + left @ right`, with a token-free right side; the bias is a vector, or has a row for each token."""
    bias, left, right = (operand for operand in q.node.args[:3] if isinstance(operand, Node))
    state = q.state(left)
    if isinstance(q.state(right), Tokens) or (isinstance(state, Tokens) and state.dim == len(shape_of(left)) - 1):
        return "it contracts the token axis"
    if isinstance(q.state(bias), Tokens) and not isinstance(state, Tokens):
        return "its bias carries the token axis"
    if not isinstance(state, Tokens):
        return Flow(FREE)
    return align(q, [bias, left], len(q.shape), own_dims=(len(q.shape) - 1,))


def baddbmm(q: Query) -> Flow | str:
    """`beta * bias + alpha * (left @ right)`, of batches; the bias broadcasts against the product."""
    bias, left, right = (operand for operand in q.node.args[:3] if isinstance(operand, Node))
    flow, state, shape = _product(q, left, right), q.state(bias), shape_of(bias)
    if isinstance(flow, str):
        return flow
    if any(isinstance(edit, Accumulate) for edit in flow.edits):
        return "it contracts the token axis"
    if not isinstance(flow.state, Tokens):
        return "its bias carries the token axis" if isinstance(state, Tokens) else flow
    place = flow.state.at(flow.state.dim - len(q.shape) + len(shape))
    if isinstance(state, Tokens):
        return flow if state == place else "its operands have different token axes"
    meets = place.dim >= 0 and shape[place.dim] != 1
    return Flow(flow.state, (*flow.edits, Gather(bias, place))) if meets else flow


def flex_attention(q: Query) -> Flow | Never:
    """`flex_attention` calls functions of the user's with the places of queries and keys."""
    if not any(isinstance(q.state(operand), Tokens) for operand in q.node.all_input_nodes):
        return Flow(FREE)
    return Never(
        "it scores and masks keys by their places in the sequence, which are others among the active tokens",
        help="use scaled_dot_product_attention, with an attn_mask if need be",
    )


RULES: dict[Any, Rule] = {
    torch.ops.higher_order.flex_attention: flex_attention,
    aten.scaled_dot_product_attention.default: attention,
    aten.matmul.default: matmul,
    aten.mm.default: matmul,
    aten._int_mm.default: matmul,
    aten.bmm.default: matmul,
    aten.addmm.default: addmm,
    aten.einsum.default: einsum,
    aten.baddbmm.default: baddbmm,
}
