"""Where the token grid comes from: latents cut into patches, by a convolution or by reshapes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, product
from math import prod
from typing import Any

import torch
from torch.fx import Node

from ..ir.axis import FREE, AxisState, Flow, OnGrid, Place, Tokens
from ..ir.refusal import shape_of
from .reshape import split
from .rule import Query, grid_of, works_along

aten = torch.ops.aten

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default)


def convolution(q: Query) -> Flow | str:
    """A convolution: patches of latents, or a filter.

    1. Over tokens: with a kernel of 1 it is a product over channels, row by row.
    2. Over a grid: each place it keeps is `stride` times coarser.
    3. Patches that do not overlap, as many as the grid has: the grid, whatever was known before.
    """
    operand, state = q.first()
    if any(isinstance(q.state(a), Tokens) for a in q.node.args[1:]):
        return "its weight carries the token axis"
    rank, (kernel, stride, *_) = len(shape_of(operand)), _geometry(q.node)
    if isinstance(state, Tokens):
        pointwise = set(kernel + stride) == {1} and shape_of(operand)[2:] == q.shape[2:]
        dims = {1} if pointwise else set(range(1, rank))
        return works_along(state, dims, "it convolves over the token axis")  # case 1
    guesses = set(_coarser(q, state, stride)) if isinstance(state, OnGrid) else set()  # case 2
    if is_patchify(q.node):
        guesses |= set(_patches(q))  # case 3
    return Flow(grid_of(guesses))


def _coarser(q: Query, state: OnGrid, stride: list[int]) -> Iterator[tuple[Place, ...]]:
    """The guesses that a convolution over a grid leaves standing."""
    old = shape_of(q.node.args[0])  # type: ignore[arg-type]
    for guess in state.guesses:
        moved = []
        for place in guess:
            if place.dim > 1:
                step = stride[place.dim - 2]
                if q.shape[place.dim] * step != old[place.dim] or place.inner % step:
                    break
                place = Place(place.dim, place.outer, place.inner // step)
            elif place.dim == 1:
                break
            moved.append(place)
        else:
            yield tuple(moved)


def _patches(q: Query) -> Iterator[tuple[Place, ...]]:
    """Guesses for patches: of a video, of an image, of the frames of a video that are folded with the batch."""
    spatial, (frames, *image) = q.shape[2:], q.grid
    dims = tuple(Place(d + 2) for d, size in enumerate(spatial) if size != 1)
    if spatial == q.grid or (frames == 1 and spatial == tuple(image)):
        yield dims
    elif spatial == tuple(image) and q.shape[0] % frames == 0:
        yield (Place(0, outer=q.shape[0] // frames), *dims)


def is_patchify(node: Node) -> bool:
    """Whether a node is a convolution into patches that do not overlap."""
    if node.target not in CONVOLUTIONS:
        return False
    kernel, stride, padding, dilation = _geometry(node)
    transposed = _argument(node, "transposed", False)
    return not transposed and kernel == stride and set(padding) <= {0} and set(dilation) <= {1}


def input_state(node: Node, grid: tuple[int, int, int]) -> AxisState:
    """What the shape of an input allows: latents of whole patches, W after H, and T anywhere before."""
    shape = shape_of(node)
    if len(shape) < 4 or prod(grid) == 1:
        return FREE
    guesses: set[tuple[Place, ...]] = set()
    for height in range(1, len(shape) - 1):
        frames = [list(_factors(shape, d, grid[0])) for d in range(height)]
        choices = [list(chain(*frames)), *(list(_factors(shape, height + i, grid[1 + i]))[:1] for i in (0, 1))]
        guesses |= set(product(*(choice for choice, size in zip(choices, grid, strict=True) if size != 1)))
    return grid_of(guesses)


def _factors(shape: tuple[int, ...], dim: int, factor: int) -> Iterator[Place]:
    """A grid size as the outer factor of a dim (patches follow), or as the inner one (a batch comes before)."""
    rest, remainder = divmod(shape[dim], factor)
    if remainder == 0 and rest > 0:
        yield split(Place(dim), (factor, rest))[0]
        yield split(Place(dim), (rest, factor))[1]


def _geometry(node: Node) -> tuple[list[int], list[int], list[int], list[int]]:
    """Kernel, stride, padding and dilation of a convolution, a number for each spatial dim."""
    weight = node.args[1]
    assert isinstance(weight, Node)
    kernel = list(shape_of(weight)[2:])
    named = (("stride", 1), ("padding", 0), ("dilation", 1))
    stride, padding, dilation = (_spread(_argument(node, name, value), len(kernel)) for name, value in named)
    return kernel, stride, padding, dilation


def _argument(node: Node, name: str, default: Any) -> Any:
    """An argument of an ATen operator by the name its schema gives it."""
    if name in node.kwargs:
        return node.kwargs[name]
    schema = node.target._schema  # type: ignore[union-attr]
    position = next((i for i, a in enumerate(schema.arguments) if a.name == name), len(node.args))
    return node.args[position] if position < len(node.args) else default


def _spread(sizes: Any, length: int) -> list[int]:
    """`[2]` or `2` means `[2, 2, 2]` to a convolution."""
    spread: list[int] = [sizes] if isinstance(sizes, int) else list(sizes)
    return spread * length if len(spread) == 1 else spread
