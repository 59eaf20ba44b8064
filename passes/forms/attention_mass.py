"""What each token gets of the attention that generative queries give: for choosing tokens, and to be measured.

Softmax attention shows it, blockwise over few queries (see `choose.attention_mass`). Linear attention and attention
that is folded (each frame by itself, say) do not.
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
from ..ir.refusal import shape_of
from .state import caller, index_inputs

aten = torch.ops.aten


@dataclass(frozen=True)
class Attention:
    """An attention over tokens whose scores can be read: of `query` and `key`, times `scale`, `masked` or not."""

    node: Node
    module: str
    query: Node
    key: Node
    tokens: Tokens
    scale: float | None
    masked: bool


def find_attentions(writes: dict[CacheEntry, Node]) -> list[Attention]:
    """The attentions whose keys a full form writes, all rows of them."""
    return [found for entry, key in writes.items() if (found := _attention(entry, key)) is not None]


def _attention(entry: CacheEntry, key: Node) -> Attention | None:
    """The attention whose keys an entry holds, if its queries and keys are the tokens, with nothing folded in."""
    if not entry.name.endswith(".key") or entry.tokens.folds != 1 or len(entry.tokens.whole) != 2:
        return None
    for user in key.users:
        if user.target is aten.scaled_dot_product_attention.default and user.args[1] is key:
            query = user.args[0]
            assert isinstance(query, Node)
            if entry.dim == len(shape_of(key)) - 2 and shape_of(query)[-2] == shape_of(key)[-2]:
                mask = user.args[3] if len(user.args) > 3 else user.kwargs.get("attn_mask")
                scale: float | None = user.kwargs.get("scale")  # type: ignore[assignment]
                return Attention(user, entry.module, query, key, entry.tokens, scale, mask is not None)
    return None


def add_mass(found: Attention, query_index: Node, num_tokens: int) -> Node:
    """Float32 `[N]`: what each token gets of one attention. Other rows, such as text, get the rest of 1.

    It stands right before the attention: queries of all of them would be held in memory else.
    """
    call = caller(found.node.graph, "mass", found.node)
    offset = found.tokens.whole[0]
    rows = call(aten.add.Scalar, query_index, offset) if offset else query_index
    mass = call(torch.ops.hetcache.attention_mass.default, found.query, found.key, rows, found.scale)
    return call(aten.slice.Tensor, mass, 0, offset, offset + num_tokens)


def measure_mass(form: Form, num_tokens: int) -> Form:
    """The full form that writes what each token gets of every attention instead of a cache.

    Args:
        form: full and functional, with all rows of keys in its cache (see `layout`).
        num_tokens: N.

    Returns:
        a form with one more index, int64 `query_index` `[NUM_QUERIES]`, that writes one float32 `[N]` for each
        attention that can be read: an entry with the attention's module path. Masked attention is left out.
    """
    graph = copy.deepcopy(form.module.graph)
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    num_outputs = len(results) - len(form.writes)
    (query_index,) = index_inputs(graph, form, {"query_index": ((NUM_QUERIES,), torch.int64)})
    masses: dict[CacheEntry, Node] = {}
    for found in find_attentions(dict(zip(form.writes, results[num_outputs:], strict=True))):
        if not found.masked:
            name, shape = f"{len(masses)}.mass", (num_tokens,)
            entry = CacheEntry(name, "none", 0, shape, torch.float32, found.module, Tokens(0), group="selection")
            masses[entry] = add_mass(found, query_index, num_tokens)
    graph.output_node().args = ((*results[:num_outputs], *masses.values()),)
    graph.eliminate_dead_code(has_side_effect)
    graph.lint()
    module = GraphModule(form.module, graph)
    verify_shapes(module, {})
    return replace(form, module=module, indices=(*form.indices, "query_index"), writes=tuple(masses))
