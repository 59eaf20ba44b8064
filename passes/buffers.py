"""Let a form keep its cache in buffers that its caller owns, instead of taking and returning tensors.

The functional form is the one we reason about and export. This pass makes the one that runs in a process: state
stays where it is in memory, and a second edit allocates nothing.

Where every inactive token is cached (M + C = N), a buffer of keys or values holds all N rows in token order: a
full step stores what it computed anyway, and a partial step overwrites the active rows and attends to all, so
nothing is gathered or concatenated. Otherwise it holds the C context rows, as in the functional form.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from .cache import Budgets, CacheEntry
from .forms import MASK_COLUMNS, Form, has_side_effect
from .indices import rows_of

aten = torch.ops.aten


def buffer_entry(entry: CacheEntry, budgets: Budgets, num_tokens: int) -> CacheEntry:
    """What the buffer for a cache entry looks like."""
    if entry.rows != "context" or budgets.num_active + budgets.num_context != num_tokens:
        return entry
    shape = list(entry.shape)
    shape[entry.dim] = entry.tokens.size(num_tokens)
    return replace(entry, shape=tuple(shape))


def write_in_place(form: Form, budgets: Budgets, num_tokens: int) -> Form:
    """A form with `writes` empty: every entry it touches is one of its `reads`, a buffer, and is overwritten."""
    graph = copy.deepcopy(form.module.graph)
    output = graph.output_node()
    results = list(output.args[0])  # type: ignore[arg-type]
    num_outputs = len(results) - len(form.writes)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    by_name = {node.name: node for node in placeholders}
    buffers = dict(zip(form.reads, placeholders[len(placeholders) - len(form.reads) :], strict=True))
    whole = budgets.num_active + budgets.num_context == num_tokens
    last = placeholders[-1]
    for entry in form.reads:
        if whole and entry.rows == "context":
            _overwrite_active_rows(graph, buffers[entry], entry, by_name["active_index"], num_tokens)
    for entry, value in zip(form.writes, results[num_outputs:], strict=True):
        if entry not in buffers:
            with graph.inserting_after(last):
                last = buffers[entry] = graph.placeholder(entry.input_name.replace(".", "_"))
        if whole and entry.rows == "context":
            value = value.args[0]  # all rows, where the functional form selects those of the context
        _store(graph, buffers[entry], value)
    output.args = (tuple(results[:num_outputs]),)
    graph.eliminate_dead_code(has_side_effect)
    graph.lint()
    entries = tuple(buffer_entry(entry, budgets, num_tokens) for entry in buffers)
    return Form(form.kind, GraphModule(form.module, graph), form.indices, entries, ())


def _overwrite_active_rows(graph: Graph, buffer: Node, entry: CacheEntry, active_index: Node, num_tokens: int) -> None:
    """`cat([cached, fresh])` becomes: write the fresh rows where they belong, use the whole buffer."""
    for concat in list(buffer.users):
        rows = concat.args[0]
        assert isinstance(rows, list | tuple)
        cached, fresh = rows
        assert concat.target is aten.cat.default
        assert cached is buffer
        assert isinstance(fresh, Node)

        def call(op: Any, *args: Any, near: Node = concat, **kwargs: Any) -> Node:
            node = graph.call_function(op, args, kwargs)
            node.meta = _origin(near)
            return node

        with graph.inserting_before(concat):
            index = rows_of(entry.tokens, active_index, num_tokens, fresh.meta["val"].device, call)
            whole = call(aten.index_copy.default, buffer, entry.dim, index, fresh)
        _restore_columns(concat)
        concat.replace_all_uses_with(whole)
        graph.erase_node(concat)
        _store(graph, buffer, whole)


def _restore_columns(concat: Node) -> None:
    """Keys are in token order again, so the mask of an attention has its own columns again."""
    for attention in list(concat.users):
        mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
        if isinstance(mask, Node) and mask.meta.get(MASK_COLUMNS):
            attention.replace_input_with(mask, mask.args[0])  # type: ignore[arg-type]


def _store(graph: Graph, buffer: Node, value: Node) -> None:
    """Overwrite a buffer at the end of the graph; compilers sink the write into what computes the value."""
    with graph.inserting_before(graph.output_node()):
        graph.call_function(aten.copy_.default, (buffer, value)).meta = _origin(value)


def _origin(node: Node) -> dict[str, object]:
    """The traces of the node that a new one stands for, and the name of this pass."""
    return {k: node.meta[k] for k in ("stack_trace", "nn_module_stack") if k in node.meta} | {"hetcache": "in place"}
