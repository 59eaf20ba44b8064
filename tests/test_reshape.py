"""`dim_groups`: which dims a reshape keeps together."""

import random
from itertools import combinations
from math import prod

import pytest

from hetcache_compile.passes.reshape import DimGroup, dim_groups

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], list[DimGroup]]] = {
    "nothing": ((), (), []),
    "the same": ((2, 3), (2, 3), [((0,), (0,)), ((1,), (1,))]),
    "merge": ((2, 3, 5, 7), (2, 105), [((0,), (0,)), ((1, 2, 3), (1,))]),
    "split": ((2, 105), (2, 3, 5, 7), [((0,), (0,)), ((1,), (1, 2, 3))]),
    "split into heads": ((2, 7, 15), (2, 7, 3, 5), [((0,), (0,)), ((1,), (1,)), ((2,), (2, 3))]),
    "merge, then split": ((2, 3, 35), (6, 5, 7), [((0, 1), (0,)), ((2,), (1, 2))]),
    "dims that overlap": ((6, 4), (4, 6), [((0, 1), (0, 1))]),
    "overlap with an end in common": ((4, 3, 5), (6, 2, 5), [((0, 1), (0, 1)), ((2,), (2,))]),
    "equal sizes, merged": ((6, 6, 6), (6, 36), [((0,), (0,)), ((1, 2), (1,))]),
    "equal sizes, first two merged": ((6, 6, 6), (36, 6), [((0, 1), (0,)), ((2,), (1,))]),
    "a new dim in front": ((3, 5), (1, 3, 5), [((), (0,)), ((0,), (1,)), ((1,), (2,))]),
    "a new dim behind": ((3,), (3, 1), [((0,), (0,)), ((), (1,))]),
    "a dim goes": ((3, 1, 5), (3, 5), [((0,), (0,)), ((1,), ()), ((2,), (1,))]),
    "a dim of size 1 inside a merge": ((3, 1, 5), (15,), [((0, 2), (0,)), ((1,), ())]),
    "a dim of size 1 inside a split": ((15,), (3, 1, 5), [((0,), (0, 2)), ((), (1,))]),
    "only dims of size 1": ((1, 1), (1,), [((0,), ()), ((1,), ()), ((), (0,))]),
    "a scalar": ((), (1, 1), [((), (0,)), ((), (1,))]),
}


@pytest.mark.parametrize(("old", "new", "groups"), CASES.values(), ids=CASES)
def test_groups(old: tuple[int, ...], new: tuple[int, ...], groups: list[DimGroup]) -> None:
    assert dim_groups(old, new) == groups


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


@pytest.mark.parametrize("number", [1, 30, 36, 64, 210, 720])
def test_random_factorizations(number: int) -> None:
    rng = random.Random(number)
    for _ in range(300):
        old, new = factorization(number, rng), factorization(number, rng)
        groups = dim_groups(old, new)
        for side, sizes in enumerate((old, new)):
            covered = [d for group in groups for d in group[side]]
            assert sorted(covered) == list(range(len(sizes)))
            carried = [d for d in covered if sizes[d] != 1]
            assert carried == sorted(carried)
        for old_dims, new_dims in groups:
            sizes = [old[d] for d in old_dims], [new[d] for d in new_dims]
            assert prod(sizes[0]) == prod(sizes[1])
            if prod(sizes[0]) == 1:
                assert len(old_dims) + len(new_dims) == 1
                continue
            assert 1 not in sizes[0] + sizes[1]
            assert sizes[0]
            assert sizes[1]
            # No group can be split: no proper prefixes have equal products.
            cuts = [{prod(side[:i]) for i in range(1, len(side))} for side in sizes]
            assert not cuts[0] & cuts[1]


@pytest.mark.parametrize("number", [12, 36])
def test_a_group_is_a_reshape_of_its_own(number: int) -> None:
    """Element by element: an index along a group's old dims decides the index along its new dims alone."""
    rng = random.Random(number)
    for _ in range(50):
        old, new = factorization(number, rng), factorization(number, rng)
        for old_dims, new_dims in dim_groups(old, new):
            images: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
            for flat in range(number):
                source, target = unravel(flat, old), unravel(flat, new)
                key = tuple(source[d] for d in old_dims)
                images.setdefault(key, set()).add(tuple(target[d] for d in new_dims))
            assert all(len(image) == 1 for image in images.values())
            assert all(a.isdisjoint(b) for a, b in combinations(images.values(), 2))


def unravel(flat: int, sizes: list[int]) -> list[int]:
    """The index of element number `flat` in a contiguous tensor."""
    index: list[int] = []
    for size in reversed(sizes):
        flat, remainder = divmod(flat, size)
        index.insert(0, remainder)
    return index


@pytest.mark.parametrize(
    ("old", "new"), [((2, 3), (5,)), ((2, 3), (2,)), ((2,), (2, 3)), ((), (2,)), ((4,), (6,)), ((3, 1), (1, 2))]
)
def test_sizes_that_do_not_match_are_an_error(old: tuple[int, ...], new: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"no reshape leads from \(.*\) to \(.*\)"):
        dim_groups(old, new)
