"""Cache the keys and values that generated tokens attend to most, where not all of them are cached.

A plan knows tokens by their places alone, so it caches those nearest to the mask. This pass lets every attention choose
its own in full steps: those that generated queries attend to most (see `attention_mass`). Their number stays C, and the
choice is made on the device, so no shape changes and nothing is waited for.

=========  ====================================================================
form       after the pass
=========  ====================================================================
full       writes the rows of each attention's C most relevant inactive tokens
partial    as before: it reads C rows, whichever they are
reuse      as before
=========  ====================================================================

An attention whose scores cannot be read (see `attention_mass`), or that has a mask, keeps the plan's tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ir.cache import CacheEntry
from ..ir.contract import CANDIDATE, NEVER, NUM_QUERIES
from ..ir.editor import FormEditor, FormPass
from ..ir.form import Trait
from ..ir.indices import runs_of
from .attention_mass import Attention, add_mass, find_attentions

aten = torch.ops.aten


@dataclass(frozen=True)
class KeepRelevant(FormPass):
    """The cached tokens of each attention are chosen in full steps.

    The form gets one more index, `query_index`.

    Attributes:
        num_tokens: N.
        num_active: M.
        num_context: C.
    """

    num_tokens: int
    num_active: int
    num_context: int

    name = "relevant"
    kinds = ("full",)
    requires = frozenset({Trait.FUNCTIONAL, Trait.CONTEXT_ROWS})

    def edit(self, form: FormEditor) -> None:
        """Choose right before each attention, and write the rows that it chose."""
        rows: dict[int | None, Node] = {}
        written = form.writes
        for entry, value in written.items():
            found = self._attention(entry, value)
            if found is not None:
                chosen = self._choose(form, found)
                rows[entry.layer] = runs_of(entry.tokens, chosen, self.num_tokens, form.after(chosen))
        for entry, value in written.items():
            if entry.is_context and entry.layer in rows:
                source, dim, _ = value.args
                written[entry] = form.at_end()(aten.index_select.default, source, dim, rows[entry.layer])
        form.writes = written
        form.drop_unused_indices()

    def _attention(self, entry: CacheEntry, value: Node) -> Attention | None:
        """The attention of whose keys an entry holds some rows, if it is one that can choose them."""
        if not entry.is_context or entry.role != "key" or value.target is not aten.index_select.default:
            return None
        key = value.args[0]
        assert isinstance(key, Node)
        return next((found for found in find_attentions({entry: key}) if not found.masked), None)

    def _choose(self, form: FormEditor, found: Attention) -> Node:
        """Int64 `[C]`: the most relevant inactive tokens of one attention, in their order."""
        query_index = form.index("query_index", (NUM_QUERIES,), torch.int64)
        active = form.index("active_index", (self.num_active,), torch.int64)
        mass = add_mass(form, found, query_index, self.num_tokens)
        call = form.before(found.node)
        candidates = call(aten.full_like.default, mass, CANDIDATE, dtype=torch.int64)
        standing = call(aten.index_fill.int_Scalar, candidates, 0, active, NEVER)
        states = call(aten.view.default, mass, [self.num_tokens, 1])  # this strategy looks at none
        return call(torch.ops.hetcache.choose_active.default, mass, states, standing, self.num_context, "attention", 1)
