"""Embed the patches of active tokens alone: gather latents, where a written form gathers what was made of all of them.

A convolution into patches that do not overlap is a product, one row for each patch, so the rows that are not read need
not be computed. They are computed in full forms, which a session takes for the model itself: bit for bit as it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

import torch
from torch.fx import Node
from torch.nn import functional

from ..ir.editor import FormEditor, FormPass
from ..ir.refusal import shape_of
from ..rules.patches import is_patchify

aten = torch.ops.aten


@dataclass(frozen=True)
class EmbedActive(FormPass):
    """`index_select` of the tokens that a convolution makes of patches becomes a product of those patches."""

    name = "patches"
    kinds = ("partial",)
    makes_tensors = False  # those of `inline` have their shapes

    def edit(self, form: FormEditor) -> None:
        """Change each embedding that nothing but the active tokens is read of."""
        for rows in form.graph.find_nodes(op="call_function", target=aten.index_select.default):
            embedding = _embedding(rows)
            if embedding is None:
                continue
            latents, weight, *bias = embedding.args[:3]
            (new,) = form.inline(rows, embed, latents, weight, bias[0] if bias else None, rows.args[2])
            rows.replace_all_uses_with(new)
            form.graph.erase_node(rows)


def _embedding(rows: Node) -> Node | None:
    """The convolution of whose tokens `rows` selects some, if nothing else is read of it."""
    tokens, dim = rows.args[:2]
    if not isinstance(tokens, Node) or tokens.target is not aten.view.default or len(tokens.users) != 1:
        return None
    embedding = tokens.args[0]
    if not isinstance(embedding, Node) or not is_patchify(embedding) or len(embedding.users) != 1 or embedding.kwargs:
        return None
    latents, weight = embedding.args[:2]
    assert isinstance(latents, Node)
    assert isinstance(weight, Node)
    batch, channels, *size = shape_of(latents)
    width, of_channels, *patch = shape_of(weight)
    grid = shape_of(embedding)[2:]
    flat = shape_of(tokens) == (batch, width, prod(grid)) and dim in (2, -1)
    # Groups, and what is cut off at the edges, have other sizes.
    whole = of_channels == channels and tuple(size) == tuple(g * p for g, p in zip(grid, patch, strict=True))
    return embedding if flat and whole and shape_of(embedding)[:2] == (batch, width) else None


def embed(
    latents: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, index: torch.Tensor
) -> tuple[torch.Tensor]:
    """Rows `index` of what a convolution makes of patches.

    Args:
        latents: [B, C, size...], each size a multiple of the patch's.
        weight: [d, C, patch...].
        bias: [d] or None.
        index: [M], of patches in row-major order.

    Returns:
        [B, d, M].
    """
    patch = weight.shape[2:]
    grid = [size // length for size, length in zip(latents.shape[2:], patch, strict=True)]
    split = latents.reshape(*latents.shape[:2], *chain(*zip(grid, patch, strict=True)))
    dims = range(2, 2 + 2 * len(grid), 2)
    places: list[Any] = []
    for length in reversed(grid):
        places.insert(0, index % length)
        index = index // length
    of_patch = split.permute(0, *dims, 1, *(dim + 1 for dim in dims))[(slice(None), *places)]
    flat = of_patch.flatten(2).flatten(0, 1)  # torch versions differ in how they flatten it themselves
    rows = functional.linear(flat, weight.flatten(1), bias).view(len(latents), -1, len(weight))
    return (rows.transpose(1, 2).contiguous(),)  # as `index_select` leaves it, which strides behind it follow
