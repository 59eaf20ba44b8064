"""Attention that a model writes by hand becomes one `scaled_dot_product_attention`.

In a product of queries and keys each token meets each other token, so a partial form cannot compute it. Of one
operator for the whole attention the table of rules knows that keys and values may come from a cache. `hand_written`
says what is found.

The results are those of the model up to rounding, and not bit for bit: the kernels of one operator add up in another
order. So `analyse` asks for it only where it must. They round no more than the model does, as they keep scores in
float32 whatever its type. In a row whose keys are all masked by minus infinity the model has no numbers, and the
operator may have zeros.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ..ir.graphs import AddNode, has_side_effect
from ..ir.refusal import shape_of
from .hand_written import CASTS, HandWritten, Mask, Operand, dtype_of, find_attention
from .replace import Replacement, rows_of

aten = torch.ops.aten

ATTENTION = aten.scaled_dot_product_attention.default
FINITE = -1e30
"""What is added to a masked score. In float32 and bfloat16 it leaves nothing of the score, and two of it are finite."""


def fuse_attention(module: GraphModule, births: Iterable[Node]) -> PassResult:
    """Attention written by hand becomes one operator; so do its slices of queries, where a loop computes them.

    Args:
        module: normalised, and changed in place.
        births: nodes of it in which tokens are born. Attention to what does not come from them, such as text, stays.
    """
    from_tokens = _reached(module, births)
    write = Replacement(module, "fuse_attention")
    made: list[Node] = []
    for node in list(module.graph.nodes):
        found = find_attention(node)
        if found is not None and not from_tokens.isdisjoint((found.scores.key.node, found.value.node)):
            attention = _written(write.before(found.place), found)
            result = _result(write.before(found.place), found, attention)
            if write.put(found.place, result):
                made.append(attention)
    if not write.known:
        return PassResult(module, False)
    module.graph.eliminate_dead_code(has_side_effect)
    for attention in _joined_slices(write, made):
        _raise(write, attention)
    module.graph.eliminate_dead_code(has_side_effect)
    return PassResult(module, bool(made))


def _reached(module: GraphModule, births: Iterable[Node]) -> set[Node]:
    """These nodes, and all that depend on them."""
    reached = set(births)
    for node in module.graph.nodes:
        if not reached.isdisjoint(node.all_input_nodes):
            reached.add(node)
    return reached


def _written(call: AddNode, found: HandWritten) -> Node:
    """The operator."""
    scores = found.scores
    q, k, v, dtype = _uncast(found)
    query = _arranged(call, replace(scores.query, node=q), scores.lead)
    for op, factor in scores.factors:
        query = call(op, query, factor)
    key = _arranged(call, replace(scores.key, node=k), scores.lead)
    value = _arranged(call, replace(found.value, node=v), found.lead)
    lead = scores.masked_lead if scores.masks else scores.lead
    operands = [_as(call, _with_lead(call, operand, lead), dtype) for operand in (query, key, value)]
    mask = _mask(call, scores.masks, dtype, len(lead) + 2)
    return call(ATTENTION, *operands, mask, 0.0, False, scale=float(scores.scale))


def _result(call: AddNode, found: HandWritten, attention: Node) -> Node:
    """The operator's result, as the model lays it out."""
    result = _with_lead(call, attention, found.lead)
    return _as(call, _permuted(call, result, found.result), dtype_of(found.place))


def _uncast(found: HandWritten) -> tuple[Node, Node, Node, torch.dtype]:
    """Query, key, value and the type to compute in.

    A model that casts queries and keys up means to keep scores in float32, as the operator does by itself. Where they
    are scaled by a tensor on the way, or a mask says more than the type of the operands can, they stay cast up.
    """
    q, k, v = found.scores.query.node, found.scores.key.node, found.value.node
    uncast = [node.args[0] if node.target in CASTS else node for node in (q, k)]
    factors = [factor for _, factor in found.scores.factors]
    if not factors and all(isinstance(node, Node) and dtype_of(node) == dtype_of(v) for node in uncast):
        q, k = uncast  # type: ignore[assignment]
    dtype = torch.promote_types(torch.promote_types(dtype_of(q), dtype_of(k)), dtype_of(v))
    for factor in factors:
        dtype = torch.promote_types(dtype, dtype_of(factor)) if shape_of(factor) else dtype
    for mask in found.scores.masks:
        given = dtype_of(mask.node)
        if mask.value is None and given.is_floating_point:
            dtype = torch.promote_types(dtype, given)
        elif mask.value not in (None, -float("inf")) and dtype is torch.float16:
            dtype = torch.float32  # no number of float16 leaves nothing of a score
    return q, k, v, dtype


def _mask(call: AddNode, masks: Sequence[Mask], dtype: torch.dtype, rank: int) -> Node | None:
    """All masks as one that is added."""
    whole: Node | None = None
    for mask in masks:
        if mask.value is None:
            node = _as(call, mask.node, dtype)
            whole = node if whole is None else call(aten.add.Tensor, whole, node)
            continue
        where = call(aten.logical_not.default, mask.node) if mask.inverted else mask.node
        whole = call(aten.zeros_like.default, where, dtype=dtype) if whole is None else whole
        value = mask.value if mask.value == -float("inf") else FINITE
        whole = call(aten.masked_fill.Scalar, whole, where, value)
    while whole is not None and 2 != len(shape_of(whole)) < rank:  # kernels know these two
        whole = call(aten.unsqueeze.default, whole, 0)
    return whole


def _arranged(call: AddNode, operand: Operand, lead: tuple[int, ...]) -> Node:
    """An operand as `[..., rows, features]`, expanded to the sizes that it broadcasts to."""
    node = _permuted(call, operand.node, operand.order)
    if operand.lead == lead:
        return node
    sizes = [-1 if own == size else size for own, size in zip(operand.lead, lead, strict=True)]
    return call(aten.expand.default, node, [*sizes, -1, -1])


def _permuted(call: AddNode, node: Node, order: tuple[int, ...]) -> Node:
    moved = [d for d, origin in enumerate(order) if origin != d]
    if not moved:
        return node
    if len(moved) > 2:
        return call(aten.permute.default, node, list(order))
    if node.target is aten.transpose.int and {int(d) % len(order) for d in node.args[1:]} == set(moved):  # type: ignore[arg-type]
        assert isinstance(node.args[0], Node)
        return node.args[0]
    return call(aten.transpose.int, node, *moved)


def _with_lead(call: AddNode, node: Node, lead: tuple[int, ...]) -> Node:
    shape = shape_of(node)
    return node if shape[:-2] == lead else call(aten.reshape.default, node, [*lead, *shape[-2:]])


def _as(call: AddNode, node: Node, dtype: torch.dtype) -> Node:
    return node if dtype_of(node) == dtype else call(aten._to_copy.default, node, dtype=dtype)


# Slices of queries, and dims.


def _joined_slices(write: Replacement, made: Sequence[Node]) -> list[Node]:
    """`cat` of attentions whose queries are all slices of one tensor is its attention. The attentions that are left."""
    left = dict.fromkeys(node for node in made if node.users)
    for node in list(write.module.graph.find_nodes(op="call_function", target=aten.cat.default)):
        parts = list(node.args[0])
        rows = len(shape_of(node)) - 2
        dim = node.args[1] if len(node.args) > 1 else 0
        if dim not in (rows, -2) or not all(part in left and len(part.users) == 1 for part in parts):
            continue
        query = _sliced([part.args[0] for part in parts], rows)
        (masks, others) = [part.args[3] for part in parts], {(part.args[1:3], part.kwargs["scale"]) for part in parts}
        mask = masks[0] if len(set(masks)) == 1 and not _has_rows(masks[0]) else _sliced(masks, -2)
        if query is None or len(others) != 1 or (mask is None and set(masks) != {None}):
            continue
        if _has_rows(mask) and shape_of(mask)[-2] != shape_of(query)[-2]:  # type: ignore[arg-type]
            continue  # a row for each slice
        whole = write.before(node)(ATTENTION, query, *parts[0].args[1:3], mask, *parts[0].args[4:], **parts[0].kwargs)
        if write.put(node, whole):
            left = dict.fromkeys([*(one for one in left if one not in parts), whole])
    return list(left)


def _has_rows(mask: Node | None) -> bool:
    return mask is not None and shape_of(mask)[-2] != 1


def _sliced(parts: Sequence[Any], dim: int) -> Node | None:
    """The tensor that these are slices of, one after the other and all of it."""
    wholes: set[Any] = {part.args[0] for part in parts if isinstance(part, Node) and part.target is aten.slice.Tensor}
    if len(wholes) != 1:
        return None
    (whole,) = wholes
    shape = shape_of(whole)
    ends = [0]
    for part in parts:
        if not isinstance(part, Node) or part.target is not aten.slice.Tensor or part.kwargs:
            return None
        along, start, end = rows_of(part.args[1:], shape)
        if along != dim % len(shape) or start != ends[-1] or end is None:
            return None
        ends.append(end)
    return whole if ends[-1] == shape[dim] and all(a < b for a, b in pairwise(ends)) else None


def _raise(write: Replacement, attention: Node) -> None:
    """Three dims as four: the fast kernels know no other number."""
    if len(shape_of(attention)) != 3:
        return
    call = write.before(attention)
    query, key, value, mask, *others = attention.args
    operands = [call(aten.unsqueeze.default, operand, 0) for operand in (query, key, value)]
    if isinstance(mask, Node) and len(shape_of(mask)) == 3:
        mask = call(aten.unsqueeze.default, mask, 0)
    raised = call(ATTENTION, *operands, mask, *others, **attention.kwargs)
    write.put(attention, call(aten.squeeze.dims, raised, [0]))
