"""Attend to centroids of the cached context instead of all of its rows.

The full form averages keys and values over clusters of context tokens; the partial form reads C' centroids. A centroid
of n keys stands for n of them, so its scores get a bias of log n: exact where every cluster has one member, and where
the members of a cluster are equal. The bias is one more column of queries and keys, which keeps attention in its fast
kernels, where a mask would not.

=========  ==============================================  ============================================================
form       boxes: clusters are the plan's                  kmeans: each attention draws its own (see `cluster`)
=========  ==============================================  ============================================================
full       emits the mean of each cluster's rows           clusters keys, from the plan's clusters on; emits sizes too
partial    reads sizes from the plan                       reads sizes from the cache
reuse      as before                                       as before
=========  ==============================================  ============================================================
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from ..ir.axis import Tokens
from ..ir.cache import CacheEntry, with_rows
from ..ir.form import Form
from ..ir.graphs import fake_mode, has_side_effect, inline, verify_shapes
from ..ir.refusal import Refusal, UnsupportedGraphError, refuse, shape_of
from ..kernels.kmeans import centroids
from .state import StateInputs, caller, index_inputs
from .write import CONTEXT

aten = torch.ops.aten
LOG_SIZE = "log_size"
"""The role of an entry, as `key` and `value` are: the log-sizes of an attention's own clusters."""
COLUMNS = 8
"""Columns that are added: kernels want head sizes in multiples of 8."""


def merge_context(form: Form, num_context: int, num_merged: int, merging: str = "boxes") -> Form:
    """The form with C' centroids in place of the C context rows of keys and values.

    Args:
        form: functional, as `forms` writes it.
        num_context: C.
        num_merged: C'. The form gets two more indices: `context_cluster`, the cluster of each context token, and
            `context_log_size`, the log of each cluster's size.
        merging: "boxes" or "kmeans", which takes `context_cluster` for seeds, and keeps log-sizes in the cache.

    Raises:
        UnsupportedGraphError: an attention with a mask along the tokens, or one that is not torch's own.
    """
    if form.kind == "reuse":
        return form
    graph = copy.deepcopy(form.module.graph)
    if form.kind == "full":
        return (_cluster_rows if merging == "kmeans" else _merge_rows)(graph, form, num_context, num_merged)
    indices: tuple[str, ...] = ()
    if merging == "boxes":
        indices = ("context_log_size",)
        (shared,) = index_inputs(graph, form, {"context_log_size": ((num_merged,), torch.float32)})
    inputs = StateInputs(graph, form)
    by_name = {entry.input_name: entry for entry in form.reads}
    for concat in [node for node in graph.nodes if CONTEXT in node.meta]:
        entry = by_name[concat.meta[CONTEXT]]
        cached = concat.args[0][0]
        with fake_mode(form.module):
            cached.meta["val"] = cached.meta["val"].new_empty(merged(entry, num_merged).shape)
        if entry.name.endswith(".key"):
            log_size = shared if indices else inputs.read(log_size_of(entry, num_merged))
            for attention in list(concat.users):
                _add_bias(graph, attention, concat, entry, log_size)
    return _finish(replace(form, reads=tuple(inputs.inputs)), graph, indices, num_merged, form.writes)


def merged(entry: CacheEntry, num_merged: int) -> CacheEntry:
    """An entry as it is with centroids."""
    if entry.rows != "context":
        return entry
    runs = len(entry.tokens.whole) - 1
    if runs != 1 or entry.tokens.folds != 1:
        reason = f"the keys of {entry.module} hold the tokens more than once, and their context cannot be merged"
        raise UnsupportedGraphError([Refusal(reason, help="make the plan with merged_ratio=1")])
    return replace(entry, shape=with_rows(entry.shape, entry.dim, num_merged))


def log_size_of(keys: CacheEntry, num_merged: int) -> CacheEntry:
    """The log-sizes of an attention's clusters, float32 `[B, C']`; see `cluster.centroids`."""
    batch = keys.shape[0] if len(keys.shape) > 2 else 1
    return replace(
        keys, name=keys.name.removesuffix("key") + LOG_SIZE, rows="none", dim=0, shape=(batch, num_merged),
        dtype=torch.float32, tokens=Tokens(0),
    )  # fmt: skip


def _cluster_rows(graph: Graph, form: Form, num_context: int, num_merged: int) -> Form:
    """Full: K-means of each attention's keys."""
    (seed,) = index_inputs(graph, form, {"context_cluster": ((num_context,), torch.int64)})
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = results[: len(results) - len(form.writes)]
    rows = dict(zip(form.writes, results[len(outputs) :], strict=True))
    by_name = {entry.name: entry for entry in form.writes if entry.rows == "context"}
    for name, key in by_name.items():
        if not name.endswith(".key"):
            continue
        value = by_name[name.removesuffix("key") + "value"]
        for attention in _readers(rows[key].args[0]):
            _check(attention)
        merged(key, num_merged)  # or refuse
        found = inline(graph, "merge", rows[value].next, centroids, rows[key], rows[value], seed, num_merged)
        rows[key], rows[value], rows[log_size_of(key, num_merged)] = found
    graph.output_node().args = ((*outputs, *rows.values()),)
    writes = tuple(merged(entry, num_merged) for entry in rows)
    return _finish(form, graph, ("context_cluster",), num_merged, writes)


def _merge_rows(graph: Graph, form: Form, num_context: int, num_merged: int) -> Form:
    """Full: the mean of each cluster's rows."""
    cluster, log_size = index_inputs(
        graph, form,
        {"context_cluster": ((num_context,), torch.int64), "context_log_size": ((num_merged,), torch.float32)},
    )  # fmt: skip
    call = caller(graph, "merge", graph.output_node())
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    start = len(results) - len(form.writes)
    weight = call(aten.exp.default, call(aten.neg.default, log_size))
    for number, entry in enumerate(form.writes):
        if entry.rows != "context":
            continue
        rows = results[start + number]
        if entry.name.endswith(".key"):
            for attention in _readers(rows.args[0]):
                _check(attention)
        shape = merged(entry, num_merged).shape
        zeros = call(aten.new_zeros.default, rows, list(shape), dtype=torch.float32)
        total = call(aten.index_add.default, zeros, entry.dim, cluster, _as(call, rows, torch.float32))
        mean = call(aten.mul.Tensor, total, call(aten.view.default, weight, _along(shape, entry.dim)))
        results[start + number] = _as(call, mean, entry.dtype)
    graph.output_node().args = (tuple(results),)
    writes = tuple(merged(entry, num_merged) for entry in form.writes)
    return _finish(form, graph, ("context_cluster", "context_log_size"), num_merged, writes)


def _readers(keys: Node) -> list[Node]:
    """The attentions that read these keys in a full form."""
    return [user for user in keys.users if len(user.args) > 2 and user.args[1] is keys]


def _check(attention: Node) -> None:
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    target = aten.scaled_dot_product_attention.default
    if attention.target is not target or mask is not None or attention.kwargs.get("enable_gqa"):
        reason = "an attention with a mask, grouped heads or an operator of its own cannot read merged context"
        raise UnsupportedGraphError([refuse(attention, {}, reason, "make the plan with merged_ratio=1")])


def _add_bias(graph: Graph, attention: Node, keys: Node, entry: CacheEntry, log_size: Node) -> None:
    """One more column: 1 in every query, log n / scale in the keys of centroids, 0 in fresh keys."""
    _check(attention)
    call = caller(graph, "merge", attention)
    query, value = attention.args[0], attention.args[2]
    assert isinstance(query, Node)
    assert isinstance(value, Node)
    queries, fresh = shape_of(query), shape_of(keys.args[0][1])  # type: ignore[index, arg-type]
    scale = attention.kwargs.get("scale") or queries[-1] ** -0.5
    *samples, num_merged = shape_of(log_size)
    rows = num_merged + fresh[entry.dim]
    bias = call(aten.constant_pad_nd.default, call(aten.div.Scalar, log_size, scale), [0, rows - num_merged])
    lead = [*samples, *[1] * len(fresh)][: len(fresh) - 2] if samples else []
    bias = call(aten.expand.default, call(aten.view.default, bias, [*lead, rows, 1]), [*fresh[:-2], rows, 1])

    def widen(operand: Node, column: Node | None) -> Node:
        parts = [operand] if column is None else [operand, _as(call, column, entry.dtype)]
        whole = parts[0] if len(parts) == 1 else call(aten.cat.default, parts, -1)
        return call(aten.constant_pad_nd.default, whole, [0, COLUMNS - (len(parts) - 1)])

    ones = call(aten.new_ones.default, query, [*queries[:-1], 1])
    attention.args = (widen(query, ones), widen(keys, bias), widen(value, None), *attention.args[3:])
    attention.kwargs = {**attention.kwargs, "scale": scale}
    after = caller(graph, "merge", attention.next)
    narrow = after(aten.slice.Tensor, attention, -1, 0, queries[-1])
    # Views come next, which need the memory order of an attention's own result.
    strides = attention.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    dense = after(aten.clone.default, after(aten.permute.default, narrow, order), memory_format=torch.contiguous_format)
    result = after(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])
    attention.replace_all_uses_with(result, delete_user_cb=lambda user: user is not narrow)


def _finish(
    form: Form, graph: Graph, indices: tuple[str, ...], num_merged: int, writes: tuple[CacheEntry, ...]
) -> Form:
    graph.eliminate_dead_code(has_side_effect)
    graph.lint()
    module = GraphModule(form.module, graph)
    verify_shapes(module, {})
    reads = tuple(merged(entry, num_merged) for entry in form.reads)
    return Form(form.kind, module, (*form.indices, *indices), reads, writes)


def _as(call: Any, node: Node, dtype: torch.dtype) -> Node:
    converted: Node = call(aten._to_copy.default, node, dtype=dtype)
    return converted


def _along(shape: tuple[int, ...], dim: int) -> list[int]:
    return [-1 if position == dim else 1 for position in range(len(shape))]
