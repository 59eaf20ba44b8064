"""Reshape as a small algebra: where does a factor of a dim go, and what do factors make together?

Everything a reshape does to the token axis follows from one fact. An element's place in memory order is
`(o · S + s) · I + i`, where `s` runs over a factor of size S, `o` over everything before it and `i` over everything
after it. The factor is whole inside a new dim exactly if that dim starts within `o` and ends within `i`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ..ir.axis import Place


def move(place: Place, old: Sequence[int], new: Sequence[int]) -> Place | None:
    """Where a reshape from `old` to `new` puts a factor (of size 2 or more); `None` if it is split or mixed.

    Sizes must not hold 0 and must have the same product.

    >>> move(Place(1), (2, 12, 5), (24, 5))  # rows folded with the batch
    Place(dim=0, outer=2, inner=1)
    >>> move(Place(1), (2, 12, 5), (2, 3, 4, 5)) is None
    True
    """
    outer = prod(old[: place.dim]) * place.outer
    inner = place.inner * prod(old[place.dim + 1 :])
    for dim, size in enumerate(new):
        before, after = prod(new[:dim]), prod(new[dim + 1 :])
        if size > 1 and outer % before == 0 and inner % after == 0:
            return Place(dim, outer // before, inner // after)
    return None


def split(place: Place, sizes: Sequence[int]) -> tuple[Place, ...]:
    """The places of factors of these sizes that a factor at `place` is the product of, outermost first."""
    return tuple(
        Place(place.dim, place.outer * prod(sizes[:i]), prod(sizes[i + 1 :]) * place.inner) for i in range(len(sizes))
    )


def merge(places: Sequence[Place], sizes: Sequence[int]) -> Place | None:
    """The place of the product of neighbouring factors of one dim, outermost first; `None` if they are not."""
    whole = Place(places[0].dim, places[0].outer, places[-1].inner)
    return whole if split(whole, sizes) == tuple(places) else None
