"""`move`, `split`, `merge`: where a reshape puts a factor of a dim, checked element by element."""

from __future__ import annotations

import random
from math import prod

import pytest
import torch

from hetcache_compile.passes.ir.axis import Place
from hetcache_compile.passes.rules.reshape import merge, move, split

CASES: dict[str, tuple[Place, tuple[int, ...], tuple[int, ...], Place | None]] = {
    "stays": (Place(1), (2, 7, 5), (2, 7, 5), Place(1)),
    "heads are split off": (Place(1), (2, 7, 15), (2, 7, 3, 5), Place(1)),
    "folded with the batch": (Place(1), (2, 7, 5), (14, 5), Place(0, outer=2)),
    "and back": (Place(0, outer=2), (14, 5), (2, 7, 5), Place(1)),
    "folded with heads": (Place(1), (2, 7, 3, 5), (2, 21, 5), Place(1, inner=3)),
    "folded with both": (Place(1), (2, 7, 3, 5), (42, 5), Place(0, outer=2, inner=3)),
    "from folded with heads to folded with features": (Place(1, inner=3), (2, 21, 5), (2, 105), Place(1, inner=15)),
    "the batch is split": (Place(0, outer=6), (42, 5), (2, 21, 5), Place(1, outer=3)),
    "new dims of size 1": (Place(0), (7, 5), (1, 7, 1, 5), Place(1)),
    "equal sizes, the first is split": (Place(1), (6, 6, 6), (2, 3, 6, 6), Place(2)),
    "equal sizes, merged with the one before": (Place(1), (6, 6, 6), (36, 6), Place(0, outer=6)),
    "split": (Place(1), (2, 6, 5), (2, 2, 3, 5), None),
    "mixed with the next": (Place(1), (2, 6, 5), (2, 5, 6), None),
    "mixed though sizes agree": (Place(0), (4, 6), (6, 4), None),
}


@pytest.mark.parametrize(("place", "old", "new", "result"), CASES.values(), ids=CASES)
def test_move(place: Place, old: tuple[int, ...], new: tuple[int, ...], result: Place | None) -> None:
    assert move(place, old, new) == result


def factorization(number: int, rng: random.Random) -> list[int]:
    """A random ordered factorization, with some dims of size 1."""
    factors = []
    while number > 1:
        factor = rng.choice([f for f in range(2, number + 1) if number % f == 0])
        factors.append(factor)
        number //= factor
    for _ in range(rng.randrange(3)):
        factors.insert(rng.randint(0, len(factors)), 1)
    return factors


def index_along(place: Place, shape: list[int], size: int) -> torch.Tensor:
    """For each element of a tensor, which entry of the factor it belongs to."""
    entries = torch.arange(size).repeat_interleave(place.inner).repeat(place.outer)
    return entries.view([-1 if d == place.dim else 1 for d in range(len(shape))]).expand(shape)


@pytest.mark.parametrize("number", [30, 36, 64, 210, 720])
def test_a_moved_factor_is_where_its_elements_are(number: int) -> None:
    """Found exactly if one place of the new shape holds the factor, and then it is that place."""
    rng = random.Random(number)
    found = 0
    for _ in range(200):
        old, new = factorization(number, rng), factorization(number, rng)
        dim = rng.choice([d for d, size in enumerate(old) if size > 1])
        size, outer, inner = rng.choice([f for f in splits(old[dim]) if f[0] > 1])
        place = Place(dim, outer, inner)
        entries = index_along(place, old, size).reshape(new)
        right = [p for p in places_in(new, size) if torch.equal(index_along(p, new, size), entries)]
        moved = move(place, old, new)
        assert right == ([] if moved is None else [moved])
        found += moved is not None
    assert 0 < found < 200


def splits(number: int) -> list[tuple[int, int, int]]:
    """Every `(size, outer, inner)` of this product."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return [
        (size, outer, number // size // outer) for size in divisors for outer in divisors if number // size % outer == 0
    ]


def places_in(shape: list[int], size: int) -> list[Place]:
    return [Place(d, outer, inner) for d, n in enumerate(shape) for s, outer, inner in splits(n) if s == size]


@pytest.mark.parametrize("sizes", [(2, 3, 5), (7,), (3, 2)])
def test_merge_undoes_split(sizes: tuple[int, ...]) -> None:
    place = Place(1, outer=4, inner=3)
    parts = split(place, sizes)
    assert merge(parts, sizes) == place
    shape = [1, 12 * prod(sizes)]
    index = index_along(place, shape, prod(sizes))
    for number, (part, size) in enumerate(zip(parts, sizes, strict=True)):
        assert torch.equal(index_along(part, shape, size), index // prod(sizes[number + 1 :]) % size)


def test_places_that_are_no_neighbours_do_not_merge() -> None:
    first, second, third = split(Place(1), (2, 3, 5))
    assert merge((second, first, third), (3, 2, 5)) is None
    assert merge((first, third), (2, 5)) is None
    assert merge((first, second, Place(2)), (2, 3, 5)) is None
    assert merge((second, third), (3, 5)) == Place(1, outer=2)
