"""Let a full step choose the active tokens of the partial steps after it.

The choice is data: the full form emits `active_index`, the partial form reads it as it reads any other part of the
cache. No shape changes, nothing is compiled anew. It needs keys and values of all tokens in the cache, since any
context token may become active (see `layout`).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace

import torch
from torch.fx import GraphModule, Node

from ..ir.axis import Tokens
from ..ir.cache import CacheEntry
from ..ir.contract import NUM_QUERIES
from ..ir.form import Form
from ..ir.graphs import has_side_effect, verify_shapes
from ..ir.refusal import Refusal, UnsupportedGraphError, shape_of
from ..kernels.token_choice import NUM_CLUSTERS
from .attention_mass import Attention, add_mass, find_attentions
from .state import Call, caller, index_inputs

aten = torch.ops.aten


@dataclass(frozen=True)
class Selection:
    """How a full step chooses: one of `choose.STRATEGIES`, for M of N tokens."""

    strategy: str
    num_tokens: int
    num_active: int

    @property
    def entry(self) -> CacheEntry:
        """The active tokens as a part of the cache: int64 `[M]`."""
        return CacheEntry("active_index", "none", 0, (self.num_active,), torch.int64, "", Tokens(0), group="selection")


def select_active(form: Form, selection: Selection) -> Form:
    """The form with its active tokens chosen in full steps.

    Args:
        form: functional, with all rows of keys and values in its cache.
        selection: how.

    Raises:
        UnsupportedGraphError: no attention shows which tokens matter, or what is cached depends on which are active.
    """
    if form.kind == "reuse":
        return form
    if "context_index" in form.indices:
        raise _refusal("a sum over fixed context tokens is cached (linear attention)")
    if form.kind == "partial":
        return replace(form, indices=(), reads=(selection.entry, *form.reads))
    graph = copy.deepcopy(form.module.graph)
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    writes = dict(zip(form.writes, results[len(results) - len(form.writes) :], strict=True))
    indices = {"query_index": ((NUM_QUERIES,), torch.int64), "token_standing": ((selection.num_tokens,), torch.int64)}
    query_index, token_standing = index_inputs(graph, form, indices)
    call = caller(graph, "select", graph.output_node())
    attentions = find_attentions(writes)
    if not attentions:
        raise _refusal("no attention shows which context tokens matter")
    masses = [add_mass(found, query_index, selection.num_tokens) for found in attentions]
    relevance = call(aten.mean.dim, call(aten.stack.default, masses), [0])
    middle = attentions[len(attentions) // 2]
    active = call(
        torch.ops.hetcache.choose_active.default, relevance, _states(call, middle, selection.num_tokens),
        token_standing, selection.num_active, selection.strategy, NUM_CLUSTERS,
    )  # fmt: skip
    graph.output_node().args = ((*results, active),)
    graph.eliminate_dead_code(has_side_effect)
    graph.lint()
    module = GraphModule(form.module, graph)
    verify_shapes(module, {})
    return replace(form, module=module, indices=tuple(indices), writes=(*form.writes, selection.entry))


def _refusal(reason: str) -> UnsupportedGraphError:
    return UnsupportedGraphError([Refusal(reason, help="make the plan with selection='uniform'")])


def _states(call: Call, found: Attention, num_tokens: int) -> Node:
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
