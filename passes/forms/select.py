"""Let a full step choose the active tokens of the partial steps after it.

The choice is data: the full form emits `active_index`, the partial form reads it as it reads any other part of the
cache. No shape changes, nothing is compiled anew. It needs keys and values of all tokens in the cache, since any
context token may become active (see `all_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from ..ir.axis import Tokens
from ..ir.cache import CacheEntry
from ..ir.contract import NUM_QUERIES
from ..ir.editor import FormEditor, FormPass
from ..ir.form import Trait
from ..ir.graphs import AddNode
from ..ir.refusal import Refusal, UnsupportedGraphError, shape_of
from ..kernels.token_choice import NUM_CLUSTERS
from .attention_mass import Attention, add_mass, find_attentions

aten = torch.ops.aten


@dataclass(frozen=True)
class SelectActive(FormPass):
    """The active tokens are chosen in full steps.

    Attributes:
        strategy: one of `contract.STRATEGIES`.
        num_tokens: N.
        num_active: M.

    Raises:
        UnsupportedGraphError: no attention shows which tokens matter, or what is cached depends on which are active.
    """

    strategy: str
    num_tokens: int
    num_active: int

    name = "select"
    kinds = ("full", "partial")
    requires = frozenset({Trait.FUNCTIONAL, Trait.ALL_ROWS})
    ensures = frozenset({Trait.CHOOSES})

    @property
    def entry(self) -> CacheEntry:
        """The active tokens as a part of the cache: int64 `[M]`."""
        return CacheEntry(
            "active_index", "none", 0, (self.num_active,), torch.int64, "", Tokens(0), group="selection", role="index"
        )

    def cached(self, entries: tuple[CacheEntry, ...]) -> tuple[CacheEntry, ...]:
        """See `FormPass`."""
        return (*entries, self.entry)

    def edit(self, form: FormEditor) -> None:
        """Choose in full forms; read the choice in partial forms."""
        if "context_index" in form.indices:
            raise _refusal("a sum over fixed context tokens is cached (linear attention)")
        if form.kind == "partial":
            index = form.indices.pop("active_index")
            assert not form.indices, "an index is in front of the cache"
            form.reads = {self.entry: index, **form.reads}
            return
        query_index = form.index("query_index", (NUM_QUERIES,), torch.int64)
        token_standing = form.index("token_standing", (self.num_tokens,), torch.int64)
        attentions = find_attentions(form.writes)
        if not attentions:
            raise _refusal("no attention shows which context tokens matter")
        masses = [add_mass(form, found, query_index, self.num_tokens) for found in attentions]
        call = form.at_end()
        relevance = call(aten.mean.dim, call(aten.stack.default, masses), [0])
        middle = attentions[len(attentions) // 2]
        active = call(
            torch.ops.hetcache.choose_active.default, relevance, _states(call, middle, self.num_tokens),
            token_standing, self.num_active, self.strategy, NUM_CLUSTERS,
        )  # fmt: skip
        form.writes = {**form.writes, self.entry: active}


def _refusal(reason: str) -> UnsupportedGraphError:
    return UnsupportedGraphError([Refusal(reason, help="make the plan with selection='uniform'")])


def _states(call: AddNode, found: Attention, num_tokens: int) -> Node:
    """Hidden states of the tokens as `[N, E]`: what one attention's keys are projected from.

    Where there is no one projection of them, the keys themselves.
    """
    offset = found.tokens.whole[0]
    hidden = {node for node in _projected(found.key) if shape_of(node)[-2] in (num_tokens, shape_of(found.key)[-2])}
    source = hidden.pop() if len(hidden) == 1 else found.key
    first = offset if shape_of(source)[-2] == shape_of(found.key)[-2] else 0
    rows = call(aten.slice.Tensor, source, -2, first, first + num_tokens)
    rank = len(shape_of(source))
    rows = call(aten.permute.default, rows, [rank - 2, *range(rank - 2), rank - 1])
    return call(aten.reshape.default, rows, [num_tokens, -1])


def _projected(key: Node) -> set[Node]:
    """The inputs of the nearest linear operators before a node, of every path to it."""
    found, seen, waiting = set(), {key}, [key]
    while waiting:
        node = waiting.pop()
        if node.target is aten.linear.default:
            source = node.args[0]
            assert isinstance(source, Node)
            found |= {source} if len(shape_of(source)) >= 2 else set()
            continue
        waiting += [before for before in node.all_input_nodes if before not in seen]
        seen.update(node.all_input_nodes)
    return found
