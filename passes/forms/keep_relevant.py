"""Cache the keys and values that generated tokens attend to most, where not all of them are cached.

A plan knows tokens by their places alone, so it caches those nearest to the mask. This pass lets every attention choose
its own in full steps: those that generated queries attend to most (see `attention_mass`). Their number is C, or the one
that the plan has for this attention, and the choice is made on the device, so no shape changes and nothing is waited
for.

=========  ====================================================================
form       after the pass
=========  ====================================================================
full       writes the rows of each attention's C most relevant inactive tokens
partial    reads as many rows, whichever they are
reuse      as before
=========  ====================================================================

An attention whose scores cannot be read (see `attention_mass`), or that has a mask, keeps the plan's tokens. It cannot
have a number of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch.fx import Node

from ..ir.cache import CacheEntry, with_rows
from ..ir.contract import CANDIDATE, NEVER, NUM_QUERIES
from ..ir.editor import FormEditor, FormPass
from ..ir.form import Trait
from ..ir.indices import runs_of
from ..ir.refusal import Refusal, UnsupportedGraphError
from .attention_mass import Attention, add_mass, find_attentions, mask_of

aten = torch.ops.aten
ALIKE = "make the plan with cached_shares='same'"


@dataclass(frozen=True)
class KeepRelevant(FormPass):
    """The cached tokens of each attention are chosen in full steps.

    The form gets one more index, `query_index`.

    Attributes:
        num_tokens: N.
        num_active: M.
        num_context: C.
        counts: how many each attention caches, in graph order; empty where it is C for all.

    Raises:
        UnsupportedGraphError: there are other attentions than counts, or one that cannot choose.
    """

    num_tokens: int
    num_active: int
    num_context: int
    counts: tuple[int, ...] = ()

    name = "relevant"
    kinds = ("full", "partial")
    requires = frozenset({Trait.FUNCTIONAL, Trait.CONTEXT_ROWS})

    def edit(self, form: FormEditor) -> None:
        """Choose right before each attention, and write the rows that it chose; read as many."""
        if form.kind == "partial":
            counts = self._counts(form.reads)
            form.change_reads(lambda entry: _sized(entry, counts))
            return
        rows: dict[int | None, Node] = {}
        written = form.writes
        counts = self._counts(written)
        for entry, value in written.items():
            found = self._attention(entry, value)
            if found is not None:
                chosen = self._choose(form, found, counts[entry.layer])
                rows[entry.layer] = runs_of(entry.tokens, chosen, self.num_tokens, form.after(chosen))
            elif self.counts and entry.is_context and entry.role == "key":
                reason = f"the attention {entry.module} cannot choose what it caches, and so has no number of its own"
                raise UnsupportedGraphError([Refusal(reason, module=entry.module, help=ALIKE)])
        for entry, value in written.items():
            if entry.is_context and entry.layer in rows:
                source, dim, _ = value.args
                written[entry] = form.at_end()(aten.index_select.default, source, dim, rows[entry.layer])
        form.writes = {_sized(entry, counts): value for entry, value in written.items()}
        form.drop_unused_indices()

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        counts = self._counts(entries)
        return tuple(_sized(entry, counts) for entry in entries)

    def _counts(self, entries: Iterable[CacheEntry]) -> dict[int | None, int]:
        """The number of tokens of each attention, by its layer."""
        layers = [entry.layer for entry in entries if entry.is_context and entry.role == "key"]
        if self.counts and len(self.counts) != len(layers):
            reason = f"the plan has numbers of cached tokens for {len(self.counts)} attentions, the graph {len(layers)}"
            raise UnsupportedGraphError([Refusal(reason, help=ALIKE)])
        return dict(zip(layers, self.counts or [self.num_context] * len(layers), strict=True))

    def _attention(self, entry: CacheEntry, value: Node) -> Attention | None:
        """The attention of whose keys an entry holds some rows, if it is one that can choose them."""
        if not entry.is_context or entry.role != "key" or value.target is not aten.index_select.default:
            return None
        key = value.args[0]
        assert isinstance(key, Node)
        return next((found for found in find_attentions({entry: key}) if not _is_masked(key)), None)

    def _choose(self, form: FormEditor, found: Attention, count: int) -> Node:
        """Int64 `[count]`: the most relevant inactive tokens of one attention, in their order."""
        query_index = form.index("query_index", (NUM_QUERIES,), torch.int64)
        active = form.index("active_index", (self.num_active,), torch.int64)
        mass = add_mass(form, found, query_index, self.num_tokens)
        call = form.before(found.node)
        candidates = call(aten.full_like.default, mass, CANDIDATE, dtype=torch.int64)
        standing = call(aten.index_fill.int_Scalar, candidates, 0, active, NEVER)
        states = call(aten.view.default, mass, [self.num_tokens, 1])  # this strategy looks at none
        return call(torch.ops.hetcache.choose_active.default, mass, states, standing, count, "attention", 1)


def _is_masked(key: Node) -> bool:
    """Whether an attention may read keys by a mask, whose columns are of the plan's tokens. Several may read one."""
    return any(
        mask_of(user) is not None
        if user.target is aten.scaled_dot_product_attention.default
        else user.target is not aten.index_select.default
        for user in key.users
    )


def _sized(entry: CacheEntry, counts: Mapping[int | None, int]) -> CacheEntry:
    """An entry with as many tokens as its attention caches."""
    if not entry.is_context:
        return entry
    rows = (len(entry.tokens.whole) - 1) * counts[entry.layer]
    return replace(entry, shape=with_rows(entry.shape, entry.dim, rows))
