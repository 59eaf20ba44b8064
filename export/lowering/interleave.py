"""Strided writes that together fill a tensor become one stack and one view: exact, and no scatter is left.

Rotary embeddings are often written as `out[..., 0::2] = a; out[..., 1::2] = b`. Captured, that is a chain of
`slice_scatter` nodes, which exporters turn into scatters of single rows. No rule of the analysis changes: exporters
run this on finished forms.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from ...passes.ir.graphs import has_side_effect
from ...passes.ir.refusal import shape_of

aten = torch.ops.aten


def interleave_writes(module: GraphModule) -> PassResult:
    """Replace each chain of strided `slice_scatter` nodes that fills the whole tensor."""
    modified = False
    for node in reversed(list(module.graph.nodes)):
        if node.target is aten.slice_scatter.default and (parts := _parts(node)) is not None:
            _interleave(module, node, parts)
            modified = True
    module.graph.eliminate_dead_code(has_side_effect)
    return PassResult(module, modified)


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


def _interleave(module: GraphModule, last: Node, parts: list[Node]) -> None:
    _, dim, _, _ = _write_of(last)

    def call(op: Any, *args: Any) -> Node:
        """A new node in the place of `last`."""
        with module.graph.inserting_before(last):
            node = module.graph.call_function(op, args)
        node.meta = {k: last.meta[k] for k in ("stack_trace", "nn_module_stack") if k in last.meta}
        node.meta["hetcache"] = "interleave"
        with last.meta["val"].fake_mode:
            node.meta["val"] = op(*pytree.tree_map_only(Node, lambda operand: operand.meta["val"], args))
        return node

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
