"""The pure functions of the drift study: change by token kind, attention mass, prediction in time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from hetcache_compile.plan.partition import TokenKind

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
Kinds = NDArray[np.uint8]
ORDERS = (0, 1, 2)


def relative_error(guess: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """`[N]`: the L2 norm of each token's difference over the norm of its truth; both are `[N, features]`."""
    return torch.linalg.vector_norm(guess - truth, dim=-1) / torch.linalg.vector_norm(truth, dim=-1)


def mean_by_kind(values: torch.Tensor, kind: Kinds) -> Floats:
    """The mean of `[N]` values over the tokens of each `TokenKind`; NaN for a kind that has none."""
    array = values.double().numpy()
    return np.array([array[kind == k].mean() if (kind == k).any() else np.nan for k in TokenKind])


def key_mass(query: torch.Tensor, key: torch.Tensor, rows: torch.Tensor, chunk: int = 256) -> Floats:
    """How much attention each key gets, `[N]`: the mean over heads and query rows, so that it sums to 1.

    One head and `chunk` rows at a time: no more than `chunk` x N weights are held.

    Args:
        query: `[heads, N, head_dim]`, positions included.
        key: the same.
        rows: int64, the queries that count.
        chunk: queries at a time.
    """
    scale = query.shape[-1] ** -0.5
    total = torch.zeros(key.shape[1], dtype=torch.float64)
    for q, k in zip(query.float(), key.float(), strict=True):
        for part in rows.split(chunk):
            total += torch.softmax(q[part] @ k.T * scale, dim=-1).sum(dim=0)
    return np.asarray((total / (len(query) * len(rows))).numpy())


def rank(mass: Floats, tokens: Tokens) -> Tokens:
    """`tokens` by falling mass."""
    return tokens[np.argsort(-mass[tokens], kind="stable")]


def first(ranking: Tokens, share: float) -> Tokens:
    """The first `share` of a ranking, at least one token."""
    return ranking[: max(1, round(share * ranking.size))]


def mass_held(mass: Floats, ranking: Tokens, shares: Sequence[float]) -> Floats:
    """What part of the ranked tokens' mass the first x of the ranking hold, for each x of `shares`."""
    cumulative = mass[ranking].cumsum()
    return np.array([cumulative[first(ranking, share).size - 1] / cumulative[-1] for share in shares])


def attention_measures(
    mass: NDArray[np.float32],
    kind: Kinds,
    distance: Floats,
    shares: Sequence[float],
    top: float,
    lags: Sequence[int],
) -> dict[str, Floats]:
    """What a clip's `mass` `[S, blocks, N]` says. Rankings are of context tokens.

    Returns:
        mass: `[S, blocks, kinds]`, the share of each kind of key.
        curve: `[blocks, shares]`, the mass held by a block's own best tokens of that step; mean over steps.
        shared_curve: `[S, shares]`, the mass of a block held by one ranking for all blocks, that of their mean mass;
            mean over blocks.
        nearest_curve: `[S, shares]`, the same for the tokens nearest to the mask.
        overlap: `[2, lags, S]`, how much of a step's `top` set was in the set of `lag` steps ago; mean over blocks of
            their own sets, and for the shared ranking.
        stale: `[lags, S]`, the mass held by the shared `top` set of `lag` steps ago; mean over blocks.
    """
    steps, blocks, _ = mass.shape
    context = np.flatnonzero(kind == TokenKind.CONTEXT)
    nearest = context[np.argsort(distance[context], kind="stable")]
    by_step = mass.astype(np.float64)
    own = [[rank(of_block, context) for of_block in of_step] for of_step in by_step]
    shared = [rank(of_step.mean(axis=0), context) for of_step in by_step]

    def held(step: int, ranking: Tokens, at: Sequence[float]) -> Floats:
        return np.mean([mass_held(of_block, ranking, at) for of_block in by_step[step]], axis=0)

    def same(now: Tokens, before: Tokens) -> float:
        best = first(now, top)
        return np.intersect1d(best, first(before, top)).size / best.size

    overlap, stale = np.full((2, len(lags), steps), np.nan), np.full((len(lags), steps), np.nan)
    for i, lag in enumerate(lags):
        for step in range(lag, steps):
            pairs = zip(own[step], own[step - lag], strict=True)
            overlap[0, i, step] = np.mean([same(now, before) for now, before in pairs])
            overlap[1, i, step] = same(shared[step], shared[step - lag])
            stale[i, step] = held(step, shared[step - lag], [top])[0]
    curves = [[mass_held(by_step[s, b], own[s][b], shares) for b in range(blocks)] for s in range(steps)]
    return {
        "mass": np.stack([by_step[..., kind == k].sum(axis=-1) for k in TokenKind], axis=-1),
        "curve": np.mean(curves, axis=0),
        "shared_curve": np.stack([held(s, shared[s], shares) for s in range(steps)]),
        "nearest_curve": np.stack([held(s, nearest, shares) for s in range(steps)]),
        "overlap": overlap,
        "stale": stale,
    }


def extrapolate(values: Sequence[torch.Tensor], times: Sequence[float], at: float) -> torch.Tensor:
    """The value at time `at` of the polynomial of lowest degree through `values` at `times` (Lagrange's form)."""
    result = torch.zeros_like(values[0])
    for i, (value, time) in enumerate(zip(values, times, strict=True)):
        weight = np.prod([(at - other) / (time - other) for j, other in enumerate(times) if j != i])
        result += float(weight) * value
    return result


def prediction_errors(
    outputs: NDArray[np.float32], sigmas: Floats, kind: Kinds, gaps: Sequence[int]
) -> dict[str, Floats]:
    """What predicting a step's outputs from steps that lie `gap`, 2 `gap`, 3 `gap` before it costs.

    Order k uses k + 1 steps. NaN where there are too few.

    Args:
        outputs: `[S, N, features]`, velocities.
        sigmas: `[S]`, the scheduler's, without the 0 at the end.
        kind: `[N]`.
        gaps: steps between two that were computed, and from the last to the one predicted.

    Returns:
        prediction: `[2, gaps, orders, S, kinds]`, mean relative error of a token's output; time is sigma in the first
            half, the step's number in the second.
        latent_error: `[gaps, orders, S, kinds]`, the root mean square error that the prediction along sigma adds to
            the latents in the scheduler's step, in units of the latents.
    """
    tensors = [torch.from_numpy(output) for output in outputs]
    lengths = -np.diff(sigmas, append=0.0)
    shape = (len(gaps), len(ORDERS), len(tensors), len(TokenKind))
    relative, latent = np.full((2, *shape), np.nan), np.full(shape, np.nan)
    for t, times in enumerate((sigmas, np.arange(len(sigmas), dtype=np.float64))):
        for g, gap in enumerate(gaps):
            for order in ORDERS:
                for step in range((order + 1) * gap, len(tensors)):
                    known = [step - gap * (i + 1) for i in range(order + 1)]
                    past, past_times = [tensors[i] for i in known], [float(times[i]) for i in known]
                    guess = extrapolate(past, past_times, float(times[step]))
                    relative[t, g, order, step] = mean_by_kind(relative_error(guess, tensors[step]), kind)
                    if t == 0:
                        square = (guess - tensors[step]).square().mean(dim=1)
                        latent[g, order, step] = lengths[step] * np.sqrt(mean_by_kind(square, kind))
    return {"prediction": relative, "latent_error": latent}
