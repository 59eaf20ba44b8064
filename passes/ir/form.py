"""A form: one static-shape graph of a model with explicit state."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch.fx import GraphModule, Node

from .axis import Free, Tokens
from .cache import CacheEntry


class Trait(Enum):
    """What may hold of a form. Passes state which traits they require, bring about and end."""

    FUNCTIONAL = "its cache leaves as outputs; nothing is overwritten"
    CONTEXT_ROWS = "keys and values in its cache are the rows of the C context tokens"
    ALL_ROWS = "keys and values in its cache are all rows, in token order"
    MERGED = "its cache holds centroids of the context"
    CHOOSES = "full steps choose the active tokens"
    IN_PLACE = "its cache is buffers that it overwrites"


@dataclass(frozen=True)
class ContextRead:
    """Where a partial form reads a cache entry of keys or values: `rows` are cached rows, then fresh ones.

    `rows` is `cat([cached, fresh], entry.dim)`; its users are attentions.

    Attributes:
        rows: see above.
        entry: that is read.
        queries: how the rows of the attention's queries lie, `Free` where they are no tokens; None where its heads, dim
            -3 of queries, keys, values and the result, cannot be computed apart.
    """

    rows: Node
    entry: CacheEntry
    queries: Tokens | Free | None = None


@dataclass(frozen=True)
class Form:
    """A graph with explicit state.

    `module(*model_inputs, *indices, *reads)` returns `(*model_outputs, *writes)`, in these orders.

    Attributes:
        kind: `full`, `partial` or `reuse`.
        module: the graph.
        indices: names of the inputs that come from a plan.
        reads: cache entries it takes.
        writes: cache entries it returns.
        traits: what holds of it.
        context_reads: where it reads cached keys and values; nodes of `module`.
        mask_columns: masks whose columns it put in the order of cached and fresh keys; nodes of `module`, whose first
            argument is the mask in token order.
    """

    kind: str
    module: GraphModule
    indices: tuple[str, ...]
    reads: tuple[CacheEntry, ...]
    writes: tuple[CacheEntry, ...]
    traits: frozenset[Trait] = frozenset({Trait.FUNCTIONAL, Trait.CONTEXT_ROWS})
    context_reads: tuple[ContextRead, ...] = ()
    mask_columns: tuple[Node, ...] = ()
