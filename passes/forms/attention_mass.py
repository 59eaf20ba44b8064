"""What each token gets of the attention that generative queries give: for choosing tokens, and to be measured.

Softmax attention shows it, blockwise over few queries (see `token_choice.attention_mass`). Linear attention does not,
nor does attention that is folded (each frame by itself, say).
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
from ..ir.refusal import shape_of

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
    if entry.role != "key" or entry.tokens.folds != 1 or len(entry.tokens.whole) != 2:
        return None
    for user in key.users:
        if user.target is aten.scaled_dot_product_attention.default and user.args[1] is key:
            query = user.args[0]
            assert isinstance(query, Node)
            if entry.dim == len(shape_of(key)) - 2 and shape_of(query)[-2] == shape_of(key)[-2]:
                scale: float | None = user.kwargs.get("scale")  # type: ignore[assignment]
                return Attention(user, entry.module, query, key, entry.tokens, scale, mask_of(user) is not None)
    return None


def mask_of(attention: Node) -> object:
    """The mask of an attention, or None."""
    return attention.args[3] if len(attention.args) > 3 else attention.kwargs.get("attn_mask")


def add_mass(form: FormEditor, found: Attention, query_index: Node, num_tokens: int) -> Node:
    """Float32 `[N]`: what each token gets of one attention. Other rows, such as text, get the rest of 1.

    It stands right before the attention: queries of all of them would be held in memory else.
    """
    call = form.before(found.node)
    offset = found.tokens.whole[0]
    rows = call(aten.add.Scalar, query_index, offset) if offset else query_index
    mass = call(torch.ops.hetcache.attention_mass.default, found.query, found.key, rows, found.scale)
    return call(aten.slice.Tensor, mass, 0, offset, offset + num_tokens)


@dataclass(frozen=True)
class MeasureMass(FormPass):
    """The full form writes what each token gets of every attention instead of a cache.

    It has one more index, int64 `query_index` `[NUM_QUERIES]`, and writes one float32 `[N]` for each attention that can
    be read: an entry with the attention's module path. Masked attention is left out.

    Attributes:
        num_tokens: N.
    """

    num_tokens: int

    name = "mass"
    kinds = ("full",)
    requires = frozenset({Trait.FUNCTIONAL, Trait.ALL_ROWS})

    def edit(self, form: FormEditor) -> None:
        """Measure every attention."""
        query_index = form.index("query_index", (NUM_QUERIES,), torch.int64)
        masses: dict[CacheEntry, Node] = {}
        for found in find_attentions(form.writes):
            if not found.masked:
                entry = CacheEntry(
                    f"{len(masses)}.mass", "none", 0, (self.num_tokens,), torch.float32, found.module, Tokens(0),
                    group="selection", role="mass",
                )  # fmt: skip
                masses[entry] = add_mass(form, found, query_index, self.num_tokens)
        form.writes = masses
