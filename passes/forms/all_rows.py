"""Keep keys and values of all N tokens in token order, instead of those of the C context tokens.

Where every inactive token is cached (M + C = N), or where the active tokens change during an edit, a full step emits
what it computed anyway, and a partial step writes the active rows into it and attends to all of them: nothing is
gathered and nothing concatenated. Engines, which cannot write single rows of a bound tensor, keep the context rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..ir.cache import CacheEntry, with_rows
from ..ir.editor import FormEditor, FormPass
from ..ir.form import ContextRead, Trait
from ..ir.indices import rows_of
from ..ir.refusal import shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepAllRows(FormPass):
    """All rows in every cache entry that held those of the context.

    Attributes:
        num_tokens: N.
    """

    num_tokens: int

    name = "layout"
    requires = frozenset({Trait.FUNCTIONAL, Trait.CONTEXT_ROWS})
    ensures = frozenset({Trait.ALL_ROWS})
    ends = frozenset({Trait.CONTEXT_ROWS})

    def edit(self, form: FormEditor) -> None:
        """Write whole keys and values; read them with the active rows written in."""
        # Numbers and their scales are of one selection, so all are found before the first one goes.
        found = [_selection(entry, value) for entry, value in form.writes.items() if entry.rows == "context"]
        for rows in dict.fromkeys(rows for rows in found if rows is not None):
            rows.replace_all_uses_with(rows.args[0])  # type: ignore[arg-type]
        written = {self.all_rows(entry): value for entry, value in form.writes.items()}
        form.change_reads(self.all_rows)
        for read in form.context_reads:
            kept = _operands(read)[0] is form.reads[read.entry]
            whole_rows = self._write_active_rows(form, read)
            if kept:  # predictions, and what was rounded, start from what the last full step computed
                written[read.entry] = whole_rows
        form.writes = written
        form.drop_unused_indices()  # the context has no index any more

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        return tuple(map(self.all_rows, entries))

    def all_rows(self, entry: CacheEntry) -> CacheEntry:
        """An entry as it is where all rows are kept."""
        if entry.rows != "context":
            return entry
        return replace(entry, shape=with_rows(entry.shape, entry.dim, entry.tokens.size(self.num_tokens)))

    def _write_active_rows(self, form: FormEditor, read: ContextRead) -> Node:
        """`cat([cached, fresh])` becomes: the fresh rows written where they belong."""
        cached, fresh = _operands(read)
        call = form.before(read.rows, traced=True)
        device = fresh.meta["val"].device
        index = rows_of(read.entry.tokens, form.indices["active_index"], self.num_tokens, device, call)
        whole = call(aten.index_copy.default, cached, read.entry.dim, index, fresh)
        _restore_columns(form, read.rows)
        read.rows.replace_all_uses_with(whole)
        form.graph.erase_node(read.rows)
        return whole


def _selection(entry: CacheEntry, value: Node) -> Node | None:
    """Where the rows of the context were taken, of which a value was computed number by number."""
    while value.target is not aten.index_select.default:
        if not value.args or not isinstance(value.args[0], Node):
            return None
        value = value.args[0]
    dim, shape = value.args[1], shape_of(value)
    return value if dim == entry.dim and shape[entry.dim] == entry.shape[entry.dim] else None


def _operands(read: ContextRead) -> tuple[Node, Node]:
    """The cached and the fresh rows."""
    rows = read.rows.args[0]
    assert isinstance(rows, list | tuple)
    cached, fresh = rows
    assert isinstance(cached, Node)
    assert isinstance(fresh, Node)
    return cached, fresh


def _restore_columns(form: FormEditor, rows: Node) -> None:
    """Keys are in token order again, so the mask of an attention has its own columns again."""
    for attention in list(rows.users):
        mask = attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")
        if isinstance(mask, Node) and mask in form.mask_columns:
            attention.replace_input_with(mask, mask.args[0])  # type: ignore[arg-type]
