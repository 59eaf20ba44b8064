"""Reshape as a small algebra: which neighbouring dims does it keep together?"""

from __future__ import annotations

from collections.abc import Sequence

DimGroup = tuple[tuple[int, ...], tuple[int, ...]]


def dim_groups(old: Sequence[int], new: Sequence[int]) -> list[DimGroup]:
    """Split a reshape into the smallest independent pieces `(old dims, new dims)`, in order.

    A dim of size 1 carries nothing and stands alone, as `((d,), ())` or `((), (d,))`. So `(B, C, T, H, W)` to
    `(B, C, T*H*W)` gives `B-B, C-C, THW-N`. Sizes must not hold 0 and must have the same product.

    >>> dim_groups((2, 12, 5), (2, 3, 4, 5))
    [((0,), (0,)), ((1,), (1, 2)), ((2,), (3,))]
    """
    groups: list[DimGroup] = []
    i = j = 0
    while i < len(old) or j < len(new):
        if i < len(old) and old[i] == 1:
            groups.append(((i,), ()))
            i += 1
            continue
        if j < len(new) and new[j] == 1:
            groups.append(((), (j,)))
            j += 1
            continue
        if i == len(old) or j == len(new):
            raise ValueError(f"no reshape leads from {tuple(old)} to {tuple(new)}")
        left, right, start_i, start_j = old[i], new[j], i, j
        i, j = i + 1, j + 1
        while left != right:
            if (left < right and i == len(old)) or (right < left and j == len(new)):
                raise ValueError(f"no reshape leads from {tuple(old)} to {tuple(new)}")
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        kept_old = tuple(d for d in range(start_i, i) if old[d] != 1)
        kept_new = tuple(d for d in range(start_j, j) if new[d] != 1)
        groups.append((kept_old, kept_new))
        groups.extend(((d,), ()) for d in range(start_i, i) if old[d] == 1)
        groups.extend(((), (d,)) for d in range(start_j, j) if new[d] == 1)
    return groups
