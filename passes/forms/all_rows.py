"""Keep keys and values of all N tokens in token order, instead of those of the C context tokens.

Where every inactive token is cached (M + C = N), or where the active tokens change during an edit, a full step emits
what it computed anyway, and a partial step writes the active rows into it and attends to all of them: nothing is
gathered and nothing concatenated. Engines, which cannot write single rows of a bound tensor, keep the context rows.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

from torch.fx import Graph, GraphModule, Node

from ..ir.cache import CacheEntry, with_rows
from ..ir.form import Form
from ..ir.graphs import fake_mode, has_side_effect, verify_shapes
from ..ir.indices import rows_of
from .write import CONTEXT, MASK_COLUMNS, aten


def keep_all_rows(form: Form, num_tokens: int) -> Form:
    """The form with all rows in every cache entry that held those of the context.

    Args:
        form: functional, as `forms` writes it.
        num_tokens: N.
    """
    graph = copy.deepcopy(form.module.graph)
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    inputs = dict(zip(form.reads, placeholders[len(placeholders) - len(form.reads) :], strict=True))
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    num_outputs = len(results) - len(form.writes)
    writes = dict(zip(form.writes, results[num_outputs:], strict=True))
    written: dict[CacheEntry, Node] = {}
    for entry, value in writes.items():
        selected = all_rows(entry, num_tokens) != entry and value.target is aten.index_select.default
        written[all_rows(entry, num_tokens)] = value.args[0] if selected else value
    for entry, node in inputs.items():
        with fake_mode(form.module):
            node.meta["val"] = node.meta["val"].new_empty(all_rows(entry, num_tokens).shape)
    by_name = {entry.input_name: entry for entry in form.reads}
    active_index = next((node for node in placeholders if node.name == "active_index"), None)
    for concat in [node for node in graph.nodes if CONTEXT in node.meta]:
        assert active_index is not None
        entry = all_rows(by_name[concat.meta[CONTEXT]], num_tokens)
        kept = concat.args[0][0] is inputs[by_name[entry.input_name]]
        whole = _write_active_rows(graph, entry, concat, active_index, num_tokens)
        if kept:  # a prediction is not: it starts from what the last full step computed
            written[entry] = whole
    graph.output_node().args = ((*results[:num_outputs], *written.values()),)
    graph.eliminate_dead_code(has_side_effect)
    indices = _drop_unused(form.indices, placeholders, graph)
    graph.lint()
    module = GraphModule(form.module, graph)
    verify_shapes(module, {})
    reads = tuple(all_rows(entry, num_tokens) for entry in form.reads)
    return Form(form.kind, module, indices, reads, tuple(written))


def _drop_unused(indices: tuple[str, ...], placeholders: list[Node], graph: Graph) -> tuple[str, ...]:
    """The context has no index any more."""
    by_name = {node.name: node for node in placeholders}
    for name in indices:
        if not by_name[name].users:
            graph.erase_node(by_name[name])
    return tuple(name for name in indices if by_name[name].users)


def all_rows(entry: CacheEntry, num_tokens: int) -> CacheEntry:
    """An entry as it is where all rows are kept."""
    if entry.rows != "context":
        return entry
    return replace(entry, shape=with_rows(entry.shape, entry.dim, entry.tokens.size(num_tokens)))


def _write_active_rows(graph: Graph, entry: CacheEntry, concat: Node, active_index: Node, num_tokens: int) -> Node:
    """`cat([cached, fresh])` becomes: the fresh rows written where they belong."""
    rows = concat.args[0]
    assert isinstance(rows, list | tuple)
    cached, fresh = rows
    assert isinstance(fresh, Node)

    def call(op: Any, *args: Any, **kwargs: Any) -> Node:
        with graph.inserting_before(concat):
            node = graph.call_function(op, args, kwargs)
        node.meta = {k: concat.meta[k] for k in ("stack_trace", "nn_module_stack") if k in concat.meta}
        node.meta["hetcache"] = "layout"
        return node

    index = rows_of(entry.tokens, active_index, num_tokens, fresh.meta["val"].device, call)
    whole = call(aten.index_copy.default, cached, entry.dim, index, fresh)
    _restore_columns(concat)
    concat.replace_all_uses_with(whole)
    graph.erase_node(concat)
    return whole


def _restore_columns(concat: Node) -> None:
    """Keys are in token order again, so the mask of an attention has its own columns again."""
    for attention in list(concat.users):
        mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
        if isinstance(mask, Node) and mask.meta.get(MASK_COLUMNS):
            attention.replace_input_with(mask, mask.args[0])  # type: ignore[arg-type]
