"""From opset 23 on, ONNX has RotaryEmbedding: what `interleave` made of a rotation becomes one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...passes.ir.refusal import shape_of
from .subject import Lowering, before

aten = torch.ops.aten


def fuse_rotary_embedding(lowering: Lowering) -> Lowering:
    """`stack([x1 c - x2 s, x1 s + x2 c], -1)` of the pairs (x1, x2) of x is one RotaryEmbedding.

    x is `[B, S, heads, D]`; c and s are `[1 or B, S, 1, D/2]`, in a type at least as wide as that of x.
    """
    for node in list(lowering.module.graph.nodes):
        if node.target is not aten.stack.default or (found := _rotary_operands(node)) is None:
            continue
        x, cos, sin = found
        call = before(node, "fuse_rotary_embedding")
        batch, length, heads, width = shape_of(x)
        dtype = cos.meta["val"].dtype
        tables = []
        for table in (cos, sin):
            rows = call(aten.reshape.default, table, [shape_of(table)[0], length, width // 2])
            if shape_of(rows)[0] != batch:
                rows = call(aten.expand.default, rows, [batch, -1, -1])
            tables.append(rows)
        flat = call(aten.reshape.default, x, [batch, length, heads * width])
        if x.meta["val"].dtype != dtype:
            flat = call(aten.to.dtype, flat, dtype)
        rotate = torch.ops.onnx.RotaryEmbedding.opset23
        rotated = call(rotate, flat, *tables, interleaved=True, num_heads=heads)
        result = node.meta["val"]
        if result.dtype != dtype:
            rotated = call(aten.to.dtype, rotated, result.dtype)
        node.replace_all_uses_with(call(aten.reshape.default, rotated, list(result.shape)))
    return lowering


def _rotary_operands(stack: Node) -> tuple[Node, Node, Node] | None:
    """x, c and s of the pattern above, or None."""
    parts, dim = stack.args[0], stack.args[1] if len(stack.args) > 1 else 0
    if not isinstance(parts, list) or len(parts) != 2 or dim not in (-1, len(shape_of(stack)) - 1):
        return None
    real, imaginary = (_without_cast(part) for part in parts)
    if real.target is not aten.sub.Tensor or imaginary.target is not aten.add.Tensor:
        return None
    products = [_factors(operand) for operand in (*real.args[:2], *imaginary.args[:2])]
    if any(product is None for product in products) or real.kwargs or imaginary.kwargs:
        return None
    (x1, cos), (x2, sin), (y1, sin2), (y2, cos2) = products  # type: ignore[misc]
    if (x1, x2, cos, sin) != (y1, y2, cos2, sin2):
        return None
    pairs = _pairs(x1, x2)
    if pairs is None or len(shape_of(pairs)) != 4:
        return None
    batch, length, _, width = shape_of(pairs)
    allowed = {(1, length, 1, width // 2), (batch, length, 1, width // 2)}
    wide = real.meta["val"].dtype == cos.meta["val"].dtype == sin.meta["val"].dtype
    fits = shape_of(cos) in allowed and shape_of(cos) == shape_of(sin)
    return (pairs, cos, sin) if wide and fits and cos.meta["val"].dtype != torch.float64 else None


def _without_cast(node: Node) -> Node:
    while node.target is aten.to.dtype and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _factors(product: Any) -> tuple[Node, Node] | None:
    if isinstance(product, Node) and product.target is aten.mul.Tensor:
        left, right = product.args
        if isinstance(left, Node) and isinstance(right, Node):
            return left, right
    return None


def _pairs(first: Node, second: Node) -> Node | None:
    """The tensor `[B, S, heads, D]` whose neighbours along D are (`first`, `second`)."""
    operands = [node.args[0] for node in (first, second) if _is_getitem(node)]
    if len(operands) != 2 or operands[0] is not operands[1] or (first.args[1], second.args[1]) != (0, 1):
        return None
    unbind = operands[0]
    if not isinstance(unbind, Node) or unbind.target is not aten.unbind.int:
        return None
    split = unbind.args[0]
    assert isinstance(split, Node)
    if split.target is not aten.view.default or unbind.args[1] not in (-1, len(shape_of(split)) - 1):
        return None
    whole = split.args[0]
    assert isinstance(whole, Node)
    shape = shape_of(whole)
    return whole if shape_of(split) == (*shape[:-1], shape[-1] // 2, 2) else None


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"
