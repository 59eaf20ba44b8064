"""Tidy a captured graph without changing one bit of what it computes.

`PASSES` is the whole pipeline. A pass takes a module and returns a `PassResult`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from ..ir.pipeline import run_passes
from ..ir.refusal import shape_of
from .replace import Replacement, rows_of

aten = torch.ops.aten

ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten._assert_async.default,
    aten.sym_constrain_range_for_size.default,
)


def drop_asserts(module: GraphModule) -> PassResult:
    """Run-time checks of what is static here."""
    doomed = [node for node in module.graph.nodes if node.target in ASSERTS]
    for node in doomed:
        module.graph.erase_node(node)
    return PassResult(module, bool(doomed))


def drop_empty_operands(module: GraphModule) -> PassResult:
    """`cat` of one tensor and some empty ones (padding by nothing) is that tensor."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target is not aten.cat.default:
            continue
        full = [operand for operand in node.args[0] if 0 not in shape_of(operand)]
        if len(full) == 1 and shape_of(full[0]) == shape_of(node) and _same_dtype(full[0], node):
            node.replace_all_uses_with(full[0])
            module.graph.erase_node(node)
            modified = True
    return PassResult(module, modified)


def drop_whole_slices(module: GraphModule) -> PassResult:
    """A slice from 0 to the end, step 1, is its operand."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target is not aten.slice.Tensor or shape_of(node) != shape_of(node.args[0]):
            continue
        node.replace_all_uses_with(node.args[0])
        module.graph.erase_node(node)
        modified = True
    return PassResult(module, modified)


def drop_overwritten(module: GraphModule) -> PassResult:
    """A tensor that is written over, all of it, is what it is written from.

    1. By one copy, as in `x[:] = y`.
    2. Slice by slice, as in `x[:, 0:3] = y; x[:, 3:7] = z`.
    """
    write, modified = Replacement(module, "drop_overwritten"), False
    for node in list(module.graph.find_nodes(op="call_function", target=aten.copy.default)):
        source = node.args[1]
        if isinstance(source, Node) and shape_of(source) == shape_of(node) and _same_dtype(source, node):
            modified |= write.put(node, source)  # case 1
    for node in list(module.graph.find_nodes(op="call_function", target=aten.slice_scatter.default)):
        if any(user.target is aten.slice_scatter.default and user.args[0] is node for user in node.users):
            continue  # not the last of them
        sources = _written_slices(node)
        if sources:
            dim = node.args[2] if len(node.args) > 2 else 0
            modified |= write.put(node, write.before(node)(aten.cat.default, sources, dim))  # case 2
    return PassResult(module, modified)


def _written_slices(node: Node) -> list[Node] | None:
    """What is written into a tensor, in its order along a dim, if that is all of it and nothing is written twice."""
    parts: list[tuple[int, int, Node]] = []
    dims, last, size = set(), node, 0
    while last.target is aten.slice_scatter.default and not last.kwargs:
        arguments: tuple[Any, ...] = last.args
        base, source, *where = arguments
        dim, start, end = rows_of(where, shape_of(last))
        if end is None or not _same_dtype(source, base):
            return None
        size = shape_of(last)[dim]
        parts.append((start, end, source))
        dims.add(dim)
        last = base
    parts.sort(key=lambda part: part[0])
    ends = [0, *(end for _, end, _ in parts)]
    if len(dims) != 1 or [start for start, _, _ in parts] != ends[:-1] or ends[-1] != size:
        return None
    return [source for _, _, source in parts]


def drop_size_hints(module: GraphModule) -> PassResult:
    """`repeat_interleave` knows the size of its result; a form's is another one."""
    hinted = [
        node
        for node in module.graph.nodes
        if node.target is aten.repeat_interleave.self_int and node.kwargs.get("output_size") is not None
    ]
    for node in hinted:
        node.kwargs = {name: value for name, value in node.kwargs.items() if name != "output_size"}
    return PassResult(module, bool(hinted))


def name_squeezed_dims(module: GraphModule) -> PassResult:
    """`squeeze` says which dims go: those of size 1 now, whatever sizes a form has."""
    modified = False
    for node in list(module.graph.nodes):
        if node.target not in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
            continue
        shape = shape_of(node.args[0])
        named = node.args[1] if len(node.args) > 1 else list(range(len(shape)))
        gone = [d for d in ([named] if isinstance(named, int) else named) if shape[d] == 1]
        if gone:
            node.target, node.args = aten.squeeze.dims, (node.args[0], gone)
        else:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
        modified = True
    return PassResult(module, modified)


def share_subexpressions(module: GraphModule) -> PassResult:
    """Compute equal expressions once, such as the rotary tables that every block slices anew.

    Random numbers stay apart. So do 1, 1.0 and True, which Python (and torch's own `CSEPass`) holds to be equal.
    """
    first: dict[tuple[Any, str, str], Node] = {}
    modified = False
    for node in list(module.graph.nodes):
        tags = getattr(node.target, "tags", ())
        if node.op != "call_function" or torch.Tag.nondeterministic_seeded in tags:
            continue
        # A node's repr is its name, which is unique in a graph.
        same = first.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if same is not node:
            node.replace_all_uses_with(same)
            module.graph.erase_node(node)
            modified = True
    return PassResult(module, modified)


def drop_dead_code(module: GraphModule) -> PassResult:
    """What no output needs."""
    return PassResult(module, module.graph.eliminate_dead_code())


PASSES: list[Callable[[GraphModule], PassResult]] = [
    drop_asserts,
    drop_empty_operands,
    drop_whole_slices,
    drop_size_hints,
    name_squeezed_dims,
    drop_overwritten,
    share_subexpressions,
    drop_dead_code,
]


def normalise(module: GraphModule) -> GraphModule:
    """Run `PASSES` on a functional ATen graph, in place. Set HETCACHE_DUMP to a folder to see each graph."""
    module = run_passes("normalise", PASSES, module, lambda module: module)
    module.recompile()
    return module


def _same_dtype(a: Node, b: Node) -> bool:
    return bool(a.meta["val"].dtype == b.meta["val"].dtype)
