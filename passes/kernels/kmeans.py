"""K-means, twice: of cached keys, which centroids then stand for; of hidden states, over which to spread a choice.

Both iterate in `lloyd`, and each has its own way to find the nearest centre and to sum rows. Keys fall into thousands
of clusters: their distances are held block by block, and a scatter sums their rows. States fall into a few: a product
sums their rows, which gives the same result in every run, on a GPU too.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

KEY_ITERATIONS = 3
"""Lloyd's, after the seeds. Error of the reference model's attentions at C' = C / 4: 12.9 % with boxes as they are,
10.9 % after one iteration, 10.6, 10.4, and 10.2 % after eight. Each costs C' C E multiplications."""
BLOCK = 2**26
"""Distances that are held at a time: 30,000 keys and 7,500 centroids take four blocks."""
EMPTY = -1000.0
"""The log-size of a cluster without members: no attention in any type, and no infinity over a scale in float16."""
STATE_ITERATIONS = 10


def lloyd(
    centres: Tensor,
    nearest: Callable[[Tensor], Tensor],
    sums: Callable[[Tensor], tuple[Tensor, Tensor]],
    iterations: int,
) -> Tensor:
    """Lloyd's iterations: each row goes to its nearest centre, then each centre to the mean of its rows.

    Args:
        centres: `[..., K, E]` to start from. One that loses all its rows stays where it was.
        nearest: the number of the nearest centre, for each row.
        sums: of these numbers: the sum of the rows of each cluster `[..., K, E]`, and how many they are `[..., K, 1]`.
        iterations: how often the centres move.

    Returns:
        The centres after the last move, `[..., K, E]`.
    """
    for _ in range(iterations):
        total, size = sums(nearest(centres))
        centres = torch.where(size > 0, total / size.clamp(min=1), centres)
    return centres


def centroids(key: Tensor, value: Tensor, seed: Tensor, num_merged: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean keys and values of K-means clusters of the cached keys of one attention, and the logs of their sizes.

    What the full form computes for `forms.merge`, which traces it. Two keys that are alike get the same attention from
    every query, wherever they lie and whatever their values are: so keys decide, and values follow. The heads of a
    sample share its clusters: one product tells all distances, and one scatter sums all rows.

    Args:
        key: `[B, ..., C, D]`, or `[C, D]`.
        value: `[B, ..., C, Dv]`.
        seed: int64 `[C]`, clusters to start from, none of them empty.
        num_merged: C'.

    Returns:
        `[B, ..., C', D]`, `[B, ..., C', Dv]` and float32 `[B, C']`. A cluster that lost its members has zeros.
    """
    cluster = nearest_centres(_rows(key), seed, num_merged)
    keys, size = _sums(_rows(key).float(), cluster, num_merged)
    values, _ = _sums(_rows(value).float(), cluster, num_merged)
    count = size.clamp(min=1)
    log_size = torch.where(size > 0, count.log(), EMPTY)[..., 0]
    return _like(keys / count, key), _like(values / count, value), log_size


def nearest_centres(rows: Tensor, seed: Tensor, num_clusters: int) -> Tensor:
    """K-means of each sample's rows, from the clusters `seed`: int64 `[B, C]`.

    Products are taken in the type of the rows `[B, C, E]`: their mean is taken off, and they are scaled, so that these
    neither overflow nor drown differences.
    """
    exact = rows.float()
    exact = (exact - exact.mean(dim=1, keepdim=True)) * rows.shape[-1] ** -0.5

    def nearest(centres: Tensor) -> Tensor:
        return _nearest(exact.to(rows.dtype), centres.to(rows.dtype))

    sums, size = _sums(exact, seed.expand(rows.shape[0], -1), num_clusters)
    moves = KEY_ITERATIONS - 1  # the rows move last
    return nearest(lloyd(sums / size.clamp(min=1), nearest, lambda cluster: _sums(exact, cluster, num_clusters), moves))


def clusters_of_states(states: Tensor, counts: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """K-means of the rows that count, seeded with rows spread evenly over them: the same for the same states.

    Args:
        states: float `[N, E]`.
        counts: bool `[N]`; other rows form a cluster of their own, number `num_clusters`.
        num_clusters: at most; some may be empty.

    Returns:
        int64 `[N]` clusters and float `[N]` squared distances to their centres.
    """
    first = torch.argsort(counts.logical_not().to(torch.uint8), stable=True)  # rows that count, in order
    numbers = torch.arange(num_clusters, device=states.device)
    places = (numbers + 0.5) / num_clusters
    seeds = states[first[(places * counts.sum()).long().clamp(max=states.shape[0] - 1)]]
    squares = states.square().sum(dim=1, keepdim=True)

    def distances(centres: Tensor) -> Tensor:
        return squares - 2 * states @ centres.T + centres.square().sum(dim=1)

    def sums(cluster: Tensor) -> tuple[Tensor, Tensor]:
        # Not one_hot, which reads its input back to check it.
        member = ((cluster[:, None] == numbers) & counts[:, None]).to(states.dtype)
        return member.T @ states, member.sum(dim=0)[:, None]

    centres = lloyd(seeds, lambda centres: distances(centres).min(dim=1).indices, sums, STATE_ITERATIONS)
    distance, cluster = distances(centres).min(dim=1)
    return torch.where(counts, cluster, num_clusters), distance.clamp(min=0)


def _nearest(rows: Tensor, centres: Tensor) -> Tensor:
    """The nearest of the centres `[B, C', E]` to each row, `[B, C]`; blockwise: never all distances in memory."""
    half_squares = centres.float().square().sum(dim=2)[:, None] / 2
    blocks = torch.split(rows, max(1, BLOCK // half_squares.numel()), dim=1)
    nearest = [(half_squares - torch.bmm(block, centres.transpose(1, 2))).argmin(dim=2) for block in blocks]
    return torch.cat(nearest, dim=1)


def _sums(rows: Tensor, cluster: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Sum of the rows of each cluster, `[B, C', E]`, and how many they are, `[B, C', 1]`."""
    batch, _, width = rows.shape
    offset = torch.arange(batch, device=rows.device)[:, None] * num_clusters
    place = (cluster + offset).reshape(-1)
    # Two scatters, because one of rows with a column of ones would copy them. CUDA adds in any order, so last bits vary
    # from run to run there, unless `torch.use_deterministic_algorithms(True)` is set.
    sums = rows.new_zeros(batch * num_clusters, width).index_add(0, place, rows.reshape(-1, width))
    size = rows.new_zeros(batch * num_clusters).index_add(0, place, rows.new_ones(place.shape[0]))
    return sums.view(batch, num_clusters, width), size.view(batch, num_clusters, 1)


def _rows(tensor: Tensor) -> Tensor:
    """`[B, ..., C, D]` as `[B, C, all else]`."""
    batch = tensor.shape[0] if tensor.ndim > 2 else 1
    *_, count, width = tensor.shape
    return tensor.reshape(batch, -1, count, width).transpose(1, 2).reshape(batch, count, -1)


def _like(rows: Tensor, tensor: Tensor) -> Tensor:
    """`[B, C', all else]` as `_rows` found it, in the type of `tensor`."""
    batch, count, _ = rows.shape
    heads = rows.view(batch, count, -1, tensor.shape[-1]).transpose(1, 2)
    return heads.reshape(*tensor.shape[:-2], count, tensor.shape[-1]).to(tensor.dtype)
