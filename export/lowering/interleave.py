"""Strided writes that together fill a tensor become one stack and one view: exact, and no scatter is left.

Rotary embeddings are often written as `out[..., 0::2] = a; out[..., 1::2] = b`. Captured, that is a chain of
`slice_scatter` nodes, which exporters turn into scatters of single rows. No rule of the analysis changes: exporters
run this on finished forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from ...passes.ir.graphs import has_side_effect
from ...passes.ir.refusal import shape_of
from .subject import Lowering, before

aten = torch.ops.aten


def interleave_writes(lowering: Lowering) -> Lowering:
    """Replace each chain of strided `slice_scatter` nodes that fills the whole tensor."""
    graph = lowering.module.graph
    for node in reversed(list(graph.nodes)):
        if node.target is aten.slice_scatter.default and (parts := _parts(node)) is not None:
            _interleave(node, parts)
    graph.eliminate_dead_code(has_side_effect)
    return lowering


def _parts(last: Node) -> list[Node] | None:
    """What the chain that ends in `last` writes at offsets 0, 1, ... of each stride, if it fills the tensor."""
    _, dim, _, step = _write_of(last)
    size = shape_of(last)[dim]
    if step < 2 or size % step:
        return None
    parts: dict[int, Node] = {}
    node: Any = last
    while isinstance(node, Node) and node.target is aten.slice_scatter.default and len(parts) < step:
        source, *place, this_step = _write_of(node)
        if place[0] != dim or this_step != step or not 0 <= place[1] < step or not _fits(source, node, dim, step):
            return None
        parts.setdefault(place[1], source)  # the last write to an offset is the one that stays
        node = node.args[0]
    return [parts[offset] for offset in range(step)] if len(parts) == step else None


def _write_of(node: Node) -> tuple[Node, int, int, int]:
    """Source, dim, start and step of a `slice_scatter` that runs to the end; step 0 if it does not."""
    defaults: tuple[Any, ...] = (None, None, 0, None, None, 1)
    args: tuple[Any, ...] = (*node.args, *defaults[len(node.args) :])
    source, dim, start, end, step = args[1], args[2] or 0, args[3] or 0, args[4], args[5]
    dim = dim + len(shape_of(node)) if dim < 0 else dim
    to_the_end = end is None or end >= shape_of(node)[dim]
    return source, dim, start, (step if to_the_end and isinstance(source, Node) else 0)


def _fits(source: Node, node: Node, dim: int, step: int) -> bool:
    shape = list(shape_of(node))
    shape[dim] //= step
    return shape_of(source) == tuple(shape) and _dtype(source) == _dtype(node)


def _interleave(last: Node, parts: list[Node]) -> None:
    _, dim, _, _ = _write_of(last)
    call = before(last, "interleave_writes")

    def plain(part: Node) -> Node:
        """`copy(view, source)` is the source in the view's type: the values of the view do not matter."""
        if part.target is not aten.copy.default:
            return part
        view, source = part.args
        assert isinstance(view, Node)
        assert isinstance(source, Node)
        if shape_of(view) != shape_of(source):
            return part
        return source if _dtype(source) == _dtype(part) else call(aten.to.dtype, source, _dtype(part))

    stacked = call(aten.stack.default, [plain(part) for part in parts], dim + 1)
    last.replace_all_uses_with(call(aten.view.default, stacked, list(shape_of(last))))


def _dtype(node: Any) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
