"""From a mask to a partition of the tokens, and from the partition to budgets.

Kinds of tokens (HetCache, arXiv 2603.24260, section 3): *generative* inside the mask, *margin* within a few
tokens of it, *context* the rest.
"""

from __future__ import annotations

from enum import IntEnum
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.spatial import KDTree

from ..errors import MaskError, PlanError
from .mask import to_mask
from .options import RUNGS, SELECTIONS, TILE

Grid = tuple[int, int, int]


class TokenKind(IntEnum):
    """Where a token stands relative to the mask."""

    GENERATIVE = 0
    MARGIN = 1
    CONTEXT = 2


def check_grid(grid: tuple[int, ...]) -> Grid:
    """The grid as three positive sizes with at least two tokens."""
    sizes = tuple(int(size) for size in grid)
    if len(sizes) != 3 or min(sizes) < 1 or prod(sizes) < 2:
        raise PlanError(f"the token grid must be (T', H', W') with at least two tokens, got {tuple(grid)}")
    return sizes[0], sizes[1], sizes[2]


def to_token_grid(
    mask: Any, grid: Grid, *, temporal_factor: int = 4, temporal_patch: int = 1, reference_frames: int = 0
) -> NDArray[np.bool_]:
    """A mask in pixels, or already on the token grid, as bool `[T', H', W']`.

    A token is masked when any pixel it covers is. Video VAEs give the first pixel frame a latent frame of its own and
    then group `temporal_factor` frames; `temporal_patch` latent frames make one token frame; reference images stand in
    front as latent frames that are never masked.

    Args:
        mask: anything that `mask.to_mask` takes: pixels of `1 + temporal_factor * (T_latent - 1)` frames, or of one
            that stands for all, whose height and width are multiples of the grid's; or `grid` itself.
        grid: (T', H', W'), reference frames included.

    Raises:
        MaskError: another shape, or values that are no mask.
    """
    array = to_mask(mask, size=grid[1:])
    if array.shape == grid:
        return array
    latent_frames = grid[0] * temporal_patch - reference_frames
    frames = 1 + temporal_factor * (latent_frames - 1)
    count, height, width = array.shape
    if count == 1 and latent_frames > 0:
        array = np.broadcast_to(array, (frames, height, width))
    if latent_frames < 1 or array.shape[0] != frames or height % grid[1] or width % grid[2]:
        raise MaskError(
            f"a mask of shape {array.shape} does not fit the token grid {grid}: give {grid}, or pixels of "
            f"{frames} frames with height a multiple of {grid[1]} and width a multiple of {grid[2]}"
        )
    # Rows first: they lie next to each other in memory, which makes this much faster than both at once.
    rows = array.reshape(frames, grid[1], height // grid[1], width).any(axis=2)
    blocks = rows.reshape(frames, grid[1], grid[2], width // grid[2]).any(axis=3)
    starts = [0, *range(1, frames, temporal_factor)]
    return latents_to_tokens(np.logical_or.reduceat(blocks, starts, axis=0), grid, temporal_patch, reference_frames)


def latents_to_tokens(
    latent: NDArray[np.bool_], grid: Grid, temporal_patch: int, reference_frames: int
) -> NDArray[np.bool_]:
    """A mask of latent frames `[T, H', W']` as bool `grid`: references in front, which are never masked."""
    latent = np.concatenate([np.zeros((reference_frames, *grid[1:]), dtype=bool), latent])
    return np.asarray(latent.reshape(grid[0], temporal_patch, *grid[1:]).any(axis=1))


def classify(generative: NDArray[np.bool_], margin: float) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Token kinds `[N]` and each token's Euclidean distance `[N]` to the mask, in tokens, in row-major order.

    Distances run over time as well as space, because attention does.

    Raises:
        MaskError: nothing is masked.
        PlanError: the margin is negative or no number.
    """
    if not margin >= 0:
        raise PlanError(f"margin must be at least 0, got {margin}")
    if not generative.any():
        raise MaskError("the mask is empty: there is nothing to generate")
    distance = np.asarray(distance_transform_edt(~generative), dtype=np.float64).ravel()
    kind = np.full(distance.shape, TokenKind.CONTEXT, dtype=np.uint8)
    kind[distance <= margin] = TokenKind.MARGIN
    kind[distance == 0] = TokenKind.GENERATIVE
    return kind, distance


def choose_active(
    kind: NDArray[np.uint8],
    distance: NDArray[np.float64],
    *,
    margin_ratio: float,
    context_ratio: float,
    multiple: int,
    selection: str = "uniform",
) -> NDArray[np.int64]:
    """The tokens a PARTIAL step computes, sorted: `[M]`, M a multiple of `multiple`, of `rung(N)` if that is 0, or N.

    All generative tokens, the nearest `margin_ratio` of the margin, and `context_ratio` of the context: none of it,
    at random, or spread evenly over its range of distances (which full steps may change later). M is then rounded up
    by promoting the nearest tokens left: a budget is filled with useful tokens, never with padding.
    """
    if selection not in SELECTIONS:
        raise PlanError(f"selection must be one of {', '.join(SELECTIONS)}, got {selection!r}")
    for name, ratio in (("margin_ratio", margin_ratio), ("context_ratio", context_ratio)):
        if not 0 <= ratio <= 1:
            raise PlanError(f"{name} must lie between 0 and 1, got {ratio}")
    if multiple < 0:
        raise PlanError(f"multiple must be at least 0, got {multiple}")
    nearest_first = np.argsort(distance, kind="stable")
    margin = nearest_first[kind[nearest_first] == TokenKind.MARGIN]
    context = nearest_first[kind[nearest_first] == TokenKind.CONTEXT]
    active = kind == TokenKind.GENERATIVE
    active[margin[: round(margin_ratio * margin.size)]] = True
    share = round(context_ratio * context.size)
    if selection == "random":
        active[np.random.default_rng(0).choice(context, share, replace=False)] = True
    elif selection != "none" and share:
        active[context[(np.arange(share) * context.size) // share]] = True
    step = multiple or rung(active.size)
    budget = min(-(-int(active.sum()) // step) * step, active.size)
    rest = nearest_first[~active[nearest_first]]
    active[rest[: budget - int(active.sum())]] = True
    return np.flatnonzero(active)


def rung(num_tokens: int) -> int:
    """The step of the ladder of values that M may have: a sixteenth of N, rounded up to whole tiles."""
    return -(-num_tokens // (RUNGS * TILE)) * TILE


def choose_context(
    active: NDArray[np.int64], distance: NDArray[np.float64], *, cached_ratio: float
) -> NDArray[np.int64]:
    """The tokens whose K/V a PARTIAL step reads, sorted: the nearest `cached_ratio` of those not active."""
    if not 0 <= cached_ratio <= 1:
        raise PlanError(f"cached_ratio must lie between 0 and 1, got {cached_ratio}")
    inactive = np.ones(distance.size, dtype=bool)
    inactive[active] = False
    rest = np.argsort(distance, kind="stable")
    rest = rest[inactive[rest]]
    return np.sort(rest[: round(cached_ratio * rest.size)])


def nearest(chosen: NDArray[np.int64], grid: Grid, count: int) -> NDArray[np.int64]:
    """For each token those of the chosen ones `[R]` that are nearest to it, over time and space.

    Returns:
        int64 `[count, N]`: numbers of chosen tokens, the nearest first; the same ones again where fewer are chosen.
    """
    places = np.stack(np.unravel_index(np.arange(prod(grid)), grid), axis=1)
    _, found = KDTree(places[chosen]).query(places, k=range(1, 1 + min(count, chosen.size)))
    return np.ascontiguousarray(found[:, np.arange(count) % found.shape[1]].T, dtype=np.int64)


def merge_context(
    context: NDArray[np.int64], distance: NDArray[np.float64], grid: Grid, *, merged_ratio: float
) -> NDArray[np.int64]:
    """Clusters `[C]` of the cached tokens, C' = `merged_ratio` * C of them; empty where nothing is merged.

    Half of the clusters hold one token each: those nearest to the mask, which get most attention. The others are boxes
    of neighbours with as nearly equal numbers of tokens as can be: the farther tokens are halved at the median of
    their longest side, again and again (a k-d tree's leaves).
    """
    if not 0 < merged_ratio <= 1:
        raise PlanError(f"merged_ratio must be above 0 and at most 1, got {merged_ratio}")
    count = max(1, round(merged_ratio * context.size))
    if count >= context.size:
        return np.zeros(0, dtype=np.int64)
    single = (count - 1) // 2
    order = np.argsort(distance[context], kind="stable")
    cluster = np.empty(context.size, dtype=np.int64)
    cluster[order[:single]] = np.arange(single)
    places = np.stack(np.unravel_index(context, grid), axis=1)
    number = single
    boxes = [(order[single:], count - single)]
    while boxes:
        members, parts = boxes.pop()
        if parts == 1:
            cluster[members] = number
            number += 1
            continue
        extent = np.ptp(places[members], axis=0)
        along = members[np.argsort(places[members, int(extent.argmax())], kind="stable")]
        cut = members.size * (parts // 2) // parts
        boxes += [(along[:cut], parts // 2), (along[cut:], parts - parts // 2)]
    return cluster
