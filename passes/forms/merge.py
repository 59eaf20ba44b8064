"""Attend to centroids of the cached context instead of all of its rows.

The full form averages keys and values over clusters of context tokens; the partial form reads C' centroids. A centroid
of n keys stands for n of them, so its scores get a bias of log n: exact where every cluster has one member, and where
the members of a cluster are equal. The bias is one more column of queries and keys, which keeps attention in its fast
kernels, where a mask would not.

=========  ==============================================  ============================================================
form       boxes: clusters are the plan's                  kmeans: each attention draws its own (see `kmeans`)
=========  ==============================================  ============================================================
full       emits the mean of each cluster's rows           clusters keys, from the plan's clusters on; emits sizes too
partial    reads sizes from the plan                       reads sizes from the cache
reuse      as before                                       as before
=========  ==============================================  ============================================================
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from ..ir.axis import Tokens
from ..ir.cache import CacheEntry, Role, with_rows
from ..ir.editor import FormEditor, FormPass
from ..ir.form import ContextRead, Trait
from ..ir.refusal import Refusal, UnsupportedGraphError, refuse, shape_of
from ..kernels.kmeans import centroids

aten = torch.ops.aten
LOG_SIZE: Role = "log_size"
"""The role of an entry, as `key` and `value` are: the log-sizes of an attention's own clusters."""
COLUMNS = 8
"""Columns that are added: kernels want head sizes in multiples of 8."""


@dataclass(frozen=True)
class MergeContext(FormPass):
    """C' centroids in place of the C context rows of keys and values.

    The form gets one or both of two more indices: `context_cluster`, the cluster of each context token, and
    `context_log_size`, the log of each cluster's size.

    Attributes:
        num_context: C.
        num_merged: C'.
        merging: "boxes" or "kmeans", which takes `context_cluster` for seeds, and keeps log-sizes in the cache.

    Raises:
        UnsupportedGraphError: an attention with a mask along the tokens, or one that is not torch's own.
    """

    num_context: int
    num_merged: int
    merging: str = "boxes"

    name = "merge"
    kinds = ("full", "partial")
    requires = frozenset({Trait.FUNCTIONAL, Trait.CONTEXT_ROWS})
    ensures = frozenset({Trait.MERGED})
    ends = frozenset({Trait.CONTEXT_ROWS})

    def edit(self, form: FormEditor) -> None:
        """Merge in full forms; weigh centroids in partial forms."""
        if form.kind == "partial":
            self._read_centroids(form)
        elif self.merging == "kmeans":
            self._cluster_rows(form)
        else:
            self._average_rows(form)

    def _read_centroids(self, form: FormEditor) -> None:
        """Partial: attention gets the log of each centroid's size as a bias."""
        shared = None
        if self.merging == "boxes":
            shared = form.index("context_log_size", (self.num_merged,), torch.float32)
        form.change_reads(self.merged)
        for read in form.context_reads:
            if read.entry.role == "key":
                log_size = form.read(self.log_size_of(read.entry)) if shared is None else shared
                for attention in list(read.rows.users):
                    _add_bias(form, attention, read, log_size)

    def _cluster_rows(self, form: FormEditor) -> None:
        """Full: K-means of each attention's keys."""
        seed = form.index("context_cluster", (self.num_context,), torch.int64)
        rows = form.writes
        keys = [entry for entry in rows if entry.rows == "context" and entry.role == "key"]
        values = {entry.layer: entry for entry in rows if entry.rows == "context" and entry.role == "value"}
        for key in keys:
            value = values[key.layer]
            for attention in _readers(rows[key].args[0]):  # type: ignore[arg-type]
                _check(attention)
            self.merged(key)  # or refuse
            place = rows[value].next
            found = form.inline(place, centroids, rows[key], rows[value], seed, self.num_merged)
            rows[key], rows[value], rows[self.log_size_of(key)] = found
        form.writes = {self.merged(entry): value for entry, value in rows.items()}

    def _average_rows(self, form: FormEditor) -> None:
        """Full: the mean of each cluster's rows."""
        cluster = form.index("context_cluster", (self.num_context,), torch.int64)
        log_size = form.index("context_log_size", (self.num_merged,), torch.float32)
        call = form.at_end()
        weight = call(aten.exp.default, call(aten.neg.default, log_size))
        written: dict[CacheEntry, Node] = {}
        for entry, rows in form.writes.items():
            if entry.rows != "context":
                written[entry] = rows
                continue
            if entry.role == "key":
                for attention in _readers(rows.args[0]):  # type: ignore[arg-type]
                    _check(attention)
            shape = self.merged(entry).shape
            zeros = call(aten.new_zeros.default, rows, list(shape), dtype=torch.float32)
            total = call(aten.index_add.default, zeros, entry.dim, cluster, _as(call, rows, torch.float32))
            mean = call(aten.mul.Tensor, total, call(aten.view.default, weight, _along(shape, entry.dim)))
            written[self.merged(entry)] = _as(call, mean, entry.dtype)
        form.writes = written

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        keys = [entry for entry in entries if entry.rows == "context" and entry.role == "key"]
        sizes = map(self.log_size_of, keys) if self.merging == "kmeans" else ()
        return (*map(self.merged, entries), *sizes)

    def merged(self, entry: CacheEntry) -> CacheEntry:
        """An entry as it is with centroids."""
        if entry.rows != "context":
            return entry
        runs = len(entry.tokens.whole) - 1
        if runs != 1 or entry.tokens.folds != 1:
            reason = f"the keys of {entry.module} hold the tokens more than once, and their context cannot be merged"
            raise UnsupportedGraphError([Refusal(reason, help="make the plan with merged_ratio=1")])
        return replace(entry, shape=with_rows(entry.shape, entry.dim, self.num_merged))

    def log_size_of(self, keys: CacheEntry) -> CacheEntry:
        """The log-sizes of an attention's clusters, float32 `[B, C']`; see `kmeans.centroids`."""
        batch = keys.shape[0] if len(keys.shape) > 2 else 1
        return replace(
            keys, name=f"{keys.layer}.{LOG_SIZE}", role=LOG_SIZE, rows="none", dim=0, shape=(batch, self.num_merged),
            dtype=torch.float32, tokens=Tokens(0),
        )  # fmt: skip


def _readers(keys: Node) -> list[Node]:
    """The attentions that read these keys in a full form."""
    return [user for user in keys.users if len(user.args) > 2 and user.args[1] is keys]


def _check(attention: Node) -> None:
    mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
    target = aten.scaled_dot_product_attention.default
    if attention.target is not target or mask is not None or attention.kwargs.get("enable_gqa"):
        reason = "an attention with a mask, grouped heads or an operator of its own cannot read merged context"
        raise UnsupportedGraphError([refuse(attention, {}, reason, "make the plan with merged_ratio=1")])


def _add_bias(form: FormEditor, attention: Node, read: ContextRead, log_size: Node) -> None:
    """One more column: 1 in every query, log n / scale in the keys of centroids, 0 in fresh keys."""
    _check(attention)
    call = form.before(attention)
    keys, entry = read.rows, read.entry
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
    after = form.after(attention)
    narrow = after(aten.slice.Tensor, attention, -1, 0, shape_of(value)[-1])
    # Views come next, which need the memory order of an attention's own result.
    strides = attention.meta["val"].stride()
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    dense = after(aten.clone.default, after(aten.permute.default, narrow, order), memory_format=torch.contiguous_format)
    result = after(aten.permute.default, dense, [order.index(dim) for dim in range(len(order))])
    attention.replace_all_uses_with(result, delete_user_cb=lambda user: user is not narrow)


def _as(call: Any, node: Node, dtype: torch.dtype) -> Node:
    converted: Node = call(aten._to_copy.default, node, dtype=dtype)
    return converted


def _along(shape: tuple[int, ...], dim: int) -> list[int]:
    return [-1 if position == dim else 1 for position in range(len(shape))]
