"""Let several ranks share the rows of a form.

A rank's form is a partial form whose active tokens are the rank's share: of the N tokens in a full step, of the M
active ones in a partial step. So every operator that computes tokens one by one has the rows of this rank alone. This
pass edits the places where a partial form meets what it does not compute:

============  ==============================================  ==============================================
place         full                                            partial
============  ==============================================  ==============================================
attention     keys and values of all ranks                    the same, behind the cached ones
sum           of all ranks                                    the same, and the cached sum
end           the rows of all ranks                           the same, written into the cached tensor
============  ==============================================  ==============================================

An attention has its heads shared out too where P divides them and they can be computed apart (all-to-all, as DeepSpeed
Ulysses, arXiv 2309.14509): then each rank caches keys and values of its own heads alone. Else every rank gathers all
keys and values, computes its own queries, and caches all heads. A reuse form computes no token, and is not shared.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from ..analysis.analyse import Analysis
from ..ir.axis import Tokens
from ..ir.cache import CacheEntry, with_rows
from ..ir.contract import Budgets, FormOptions
from ..ir.editor import FormEditor, FormPass
from ..ir.form import ContextRead, Form
from ..ir.indices import rows_of, runs_of
from ..ir.pipeline import run_passes
from ..ir.refusal import Refusal, UnsupportedGraphError, shape_of
from ..writing.write import write_partial, write_reuse
from .collectives import Ranks, Share

aten = torch.ops.aten


def write_share(kind: str, source: GraphModule, analysis: Analysis, options: FormOptions, ranks: Ranks) -> Form:
    """One rank's form of a kind; see `writing.write`.

    Raises:
        UnsupportedGraphError: the plan asks for what ranks cannot share.
    """
    if kind == "reuse":
        return write_reuse(source, analysis, options.budgets)
    if options.selection != "fixed":
        reason = f"full steps choose the active tokens ({options.selection}), which needs the queries of all ranks"
        raise UnsupportedGraphError([Refusal(reason, help="make the plan with selection='uniform'")])
    if options.cached_by != "distance":
        reason = "full steps choose the cached tokens (by attention), which needs the queries of all ranks"
        raise UnsupportedGraphError([Refusal(reason, help="make the plan with cached_by='distance'")])
    full = kind == "full"
    rows = options.num_tokens if full else options.num_active
    # All tokens of a full step are active, and none is cached.
    budgets = Budgets(ranks.share(rows), 0 if full else options.num_context)
    form = replace(write_partial(source, analysis, budgets), kind=kind)
    one = ShardRows(ranks, options.num_tokens, rows, options.num_context, by_heads=options.merging != "kmeans")
    return run_passes(f"{kind} form of a rank", [one], form, lambda form: form.module)


@dataclass(frozen=True)
class ShardRows(FormPass):
    """Rows of all ranks where rows meet, in a partial form whose active tokens are one rank's share.

    Attributes:
        ranks: that share the rows.
        num_tokens: N.
        rows: N in a full form, M in a partial one.
        num_context: C.
        by_heads: whether attentions may share out their heads: not where a pass looks at keys of all heads.
    """

    ranks: Ranks
    num_tokens: int
    rows: int
    num_context: int
    by_heads: bool = True

    name = "shard"
    kinds = ("full", "partial")

    @property
    def share(self) -> Share:
        """This rank's."""
        return Share(self.ranks, self.rows)

    def edit(self, form: FormEditor) -> None:
        """Bring rows together in attentions, sums, and where tokens end."""
        active, context = self._indices(form)
        of_heads = {read.entry for pair in _attentions(form) if self._shares_heads(pair) for read in pair}
        form.change_reads(lambda entry: self._of_own_heads(entry) if entry in of_heads else entry)
        written: dict[CacheEntry, Node] = {}
        for pair in _attentions(form):
            by_heads = self._shares_heads(pair)
            for read, rows in zip(pair, self._attend(form, pair, by_heads, active), strict=True):
                if form.kind == "full":
                    assert context is not None
                    entry, index = read.entry, runs_of(read.entry.tokens, context, self.num_tokens, form.at_end())
                    runs = len(entry.tokens.whole) - 1
                    entry = replace(entry, shape=with_rows(entry.shape, entry.dim, runs * self.num_context))
                    written[entry] = form.at_end()(aten.index_select.default, rows, entry.dim, index)
        for entry in list(form.reads):
            if entry.role == "sum":
                written |= self._add_up(form, entry, context)
            elif entry.rows == "tokens":
                written[entry] = self._leave(form, entry, active)
        form.writes = written | {entry: value for entry, value in form.writes.items() if entry not in written}
        if form.kind == "full":  # it reads nothing
            form.sweep()
            for node in form.reads.values():
                form.graph.erase_node(node)
            form.reads = {}

    def _indices(self, form: FormEditor) -> tuple[Node | None, Node | None]:
        """Let the form compute this rank's share; returns the active tokens of all ranks, and the context.

        No index names the active tokens of a full form, which are all.
        """
        index, context = form.indices["active_index"], form.indices.get("context_index")
        start, call = self.ranks.start(self.rows), form.at_start()
        end = start + self.share.size
        if form.kind == "partial":
            own = call(aten.slice.Tensor, index, 0, start, end)
            index.replace_all_uses_with(own, delete_user_cb=lambda user: user is not own)
            _resize(form, index, self.rows)
            return index, context
        own = call(aten.arange.start, start, end, dtype=torch.int64, device=form.device)
        index.replace_all_uses_with(own)
        form.graph.erase_node(form.indices.pop("active_index"))
        context = context or form.index("context_index", (self.num_context,), torch.int64)
        _resize(form, context, self.num_context)
        return None, context

    def _shares_heads(self, pair: tuple[ContextRead, ContextRead]) -> bool:
        """Whether each rank computes some heads of the attention that reads these keys and values."""
        (attention,) = pair[0].rows.users
        if not self.by_heads or pair[0].queries is None:
            return False
        operands = [operand for operand in attention.args[:3] if isinstance(operand, Node)]
        return all(shape_of(operand)[-3] % self.ranks.size == 0 for operand in operands)

    def _of_own_heads(self, entry: CacheEntry) -> CacheEntry:
        dim = len(entry.shape) - 3
        return replace(entry, shape=with_rows(entry.shape, dim, entry.shape[dim] // self.ranks.size))

    def _attend(
        self, form: FormEditor, pair: tuple[ContextRead, ContextRead], by_heads: bool, active: Node | None
    ) -> list[Node]:
        """Let an attention see keys and values of all ranks, all heads or this rank's; returns them."""
        (attention,) = pair[0].rows.users
        queries, tokens = pair[0].queries, pair[0].entry.tokens
        layout = queries if isinstance(queries, Tokens) else None
        fresh = [read.rows.args[0][1] for read in pair]  # type: ignore[index]
        if by_heads:
            layouts = (layout, tokens, tokens)
            query, *rows = form.inline(
                pair[0].rows, partial(self.share.rows_to_heads, layouts), attention.args[0], *fresh
            )
            attention.update_arg(0, query)
        else:
            rows = form.inline(pair[0].rows, partial(self.share.gather_rows, (tokens, tokens)), *fresh)
        changed = [attention]
        for read, found in zip(pair, rows, strict=True):
            if form.kind == "full":
                read.rows.replace_all_uses_with(found)
            else:
                read.rows.args = ([form.reads[read.entry], found], read.entry.dim)
                changed.insert(-1, read.rows)
        self._see_columns(form, attention, tokens, active)
        if by_heads:
            strides = attention.meta["val"].stride()
            with form.mode:
                for node in changed:
                    args, kwargs = map_arg((node.args, node.kwargs), lambda operand: operand.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            readers = list(attention.users)
            (own,) = form.inline(
                attention.next, lambda x: _laid_out(self.share.heads_to_rows(layout, x), strides), attention
            )
            for reader in readers:
                reader.replace_input_with(attention, own)
        return rows

    def _see_columns(self, form: FormEditor, attention: Node, tokens: Tokens, active: Node | None) -> None:
        """A mask has a column for each key of all ranks."""
        for mask in [node for node in attention.all_input_nodes if node in form.mask_columns]:
            if active is None:  # all keys, in token order
                attention.replace_input_with(mask, mask.args[0])  # type: ignore[arg-type]
                continue
            index = mask.args[2]
            assert isinstance(index, Node)
            context, _ = index.args[0]  # type: ignore[misc, str-unpack]
            call = form.before(index)
            index = rows_of(tokens, active, self.num_tokens, form.device, call)
            mask.update_arg(2, call(aten.cat.default, [context, index]))
            columns = (len(tokens.whole) - 1) * self.num_context + tokens.size(self.rows)
            with form.mode:
                mask.meta["val"] = mask.meta["val"].new_empty((*shape_of(mask)[:-1], columns))

    def _add_up(self, form: FormEditor, entry: CacheEntry, context: Node | None) -> dict[CacheEntry, Node]:
        """A sum over the rows of all ranks; a full form also writes that over the context."""
        (total,) = form.reads[entry].users
        product, _ = total.args
        assert isinstance(product, Node)
        left, right = product.args[:2]
        share, tokens = self.share, entry.tokens
        written = {}
        if form.kind == "full":
            start = self.ranks.start(self.rows)

            def of_context(rows: Tensor, index: Tensor) -> Tensor:
                counted = rows.new_zeros(self.num_tokens).index_fill(0, index, 1)[start : start + share.size]
                return rows * share.weights(tokens, rows, counted)

            (rows,) = form.inline(product, of_context, left, context)
            part = form.before(total)(product.target, rows, right)
            part.meta["val"] = product.meta["val"]
            (written[entry],) = form.inline(total, share.add_up, part)
        (once,) = form.inline(product, lambda rows: rows * share.weights(tokens, rows), left)
        product.update_arg(0, once)
        (everything,) = form.inline(total, share.add_up, product)
        if form.kind == "full":
            total.replace_all_uses_with(everything)
        else:
            total.update_arg(0, everything)
        return written

    def _leave(self, form: FormEditor, entry: CacheEntry, active: Node | None) -> Node:
        """The whole token tensor, of the rows of all ranks."""
        whole = form.writes[entry]
        _, dim, _, rows = whole.args
        (found,) = form.inline(whole, lambda x: self.share.gather_rows((entry.tokens,), x)[0].contiguous(), rows)
        if active is None:
            whole.replace_all_uses_with(found)
            return found
        index = rows_of(entry.tokens, active, self.num_tokens, form.device, form.before(whole))
        whole.args = (form.reads[entry], dim, index, found)
        return whole


def _attentions(form: FormEditor) -> list[tuple[ContextRead, ContextRead]]:
    """Keys and values that an attention reads."""
    reads: dict[int | None, list[ContextRead]] = {}
    for read in form.context_reads:
        reads.setdefault(read.entry.layer, []).append(read)
    return [(key, value) for key, value in reads.values()]


def _resize(form: FormEditor, index: Node, length: int) -> None:
    with form.mode:
        index.meta["val"] = index.meta["val"].new_empty((length,))


def _laid_out(value: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same, with its dims in memory as strides say: views come next, which need the order of an attention's own."""
    order = sorted(range(len(strides)), key=lambda dim: -strides[dim])
    return value.permute(order).contiguous().permute([order.index(dim) for dim in range(len(order))])
