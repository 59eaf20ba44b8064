"""Which context tokens a partial step computes beside the generative ones: relevant, representative, or both.

HetCache (arXiv 2603.24260, section 3) computes those context tokens that generative queries attend to most, spread
over clusters of the context's hidden states. All of it runs on the model's device and without waiting for it: shapes
depend on budgets only, and nothing is read back.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ir.contract import ALWAYS, CANDIDATE, NEVER
from .kmeans import clusters_of_states

NUM_CLUSTERS = 16
BLOCK = 2**24
"""Attention scores that are held at a time."""


@torch.library.custom_op("hetcache::attention_mass", mutates_args=())
def attention_mass(query: Tensor, key: Tensor, query_rows: Tensor, scale: float | None = None) -> Tensor:
    """The attention that each key gets from some queries, averaged over batch, heads and these queries.

    Blockwise over the queries: never an N x N matrix in memory.

    Args:
        query: `[..., N, D]`.
        key: `[..., K, D]`; fewer heads than the query's are shared by groups of its heads.
        query_rows: int64 `[Q]`.
        scale: of the scores; 1 / sqrt(D) by default.

    Returns:
        float32 `[K]`, which sums to 1.
    """
    rows = query.index_select(-2, query_rows)
    if key.ndim == 4 and key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    columns = key.float().transpose(-1, -2)  # products of half precision overflow before they are scaled
    per_query = max(1, key[..., 0].numel())
    total = torch.zeros(key.shape[-2], dtype=torch.float32, device=key.device)
    for block in torch.split(rows, max(1, BLOCK // per_query), dim=-2):
        scores = (block.float() * scale) @ columns
        total += scores.softmax(dim=-1).sum(dim=tuple(range(scores.ndim - 1)))
    return total / rows[..., 0].numel()


@attention_mass.register_fake
def _(query: Tensor, key: Tensor, query_rows: Tensor, scale: float | None = None) -> Tensor:
    return key.new_empty(key.shape[-2], dtype=torch.float32)


@torch.library.custom_op("hetcache::choose_active", mutates_args=())
def choose_active(
    relevance: Tensor, states: Tensor, standing: Tensor, num_active: int, strategy: str, num_clusters: int
) -> Tensor:
    """The tokens to compute: all that are always active, and the best of the candidates.

    Args:
        relevance: float `[N]`, such as `attention_mass`.
        states: `[N, E]` hidden states.
        standing: int64 `[N]` of `ALWAYS`, `CANDIDATE` and `NEVER`.
        num_active: M, at least as many as are always active, at most as many as may be.
        strategy: one of `STRATEGIES`.
        num_clusters: of the K-means over the states of the candidates.

    Returns:
        int64 `[M]`, sorted.
    """
    if strategy == "attention":
        score = relevance.float()
    else:
        cluster, distance = clusters_of_states(states.float(), standing == CANDIDATE, num_clusters)
        score = spread(-distance if strategy == "kmeans" else relevance, cluster, num_clusters + 1)
    score = score.nan_to_num(-torch.finfo(torch.float32).max)
    score = score.masked_fill(standing == ALWAYS, torch.inf).masked_fill(standing == NEVER, -torch.inf)
    # A stable sort: which of equal tokens is taken must not depend on the device.
    return score.argsort(descending=True, stable=True)[:num_active].sort().values


@choose_active.register_fake
def _(relevance: Tensor, states: Tensor, standing: Tensor, num_active: int, strategy: str, num_clusters: int) -> Tensor:
    return relevance.new_empty(num_active, dtype=torch.int64)


def spread(score: Tensor, cluster: Tensor, num_clusters: int) -> Tensor:
    """Scores by which the best K tokens are the best of each cluster, in proportion to its size.

    The token of rank r in a cluster of n gets `-(r + 1/2) / n`: so many from the top of a cluster pass any threshold
    as is its share of all tokens.
    """
    order = torch.argsort(score, descending=True, stable=True)
    order = order[torch.argsort(cluster[order], stable=True)]
    sizes = torch.zeros_like(score).new_zeros(num_clusters).index_add(0, cluster, torch.ones_like(score))
    starts = sizes.cumsum(0) - sizes
    sorted_cluster = cluster[order]
    rank = torch.arange(score.shape[0], device=score.device) - starts[sorted_cluster]
    result = torch.empty_like(score, dtype=torch.float32)
    result[order] = -((rank + 0.5) / sizes[sorted_cluster]).float()
    return result
