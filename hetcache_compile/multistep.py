"""Outputs of steps that compute little, from those that computed: a linear multistep method fitted to the model.

A solver integrates the model's output over the noise levels. Where a step computes nothing its output is predicted, and
where one computes again it can say what the predictions before it should have been. Both are linear combinations of a
few computed outputs, as in the predictors and correctors of Adams' methods (and UniPC, arXiv 2302.04867). Adams'
weights suit polynomials. Outputs of a diffusion model are no polynomials (they turn sharply at the end), but how they
vary together over the steps is nearly the same for every edit, and a calibration knows it: the inner products of the
outputs of all steps (`Calibration.gram`). So the weights here are those of least expected squared error:

* predicted: `E |v_j - sum_i w_i v_(s_i)|^2` is least, over the last computed steps s_i;
* corrected: the step k that computes again also knows its own output. `E |sum_j l_j v_j - sum_i w_i v_(s_i)|^2` is
  least over k and the steps s_i, where j runs over the steps since the last computed one and l_j is how far each moves
  the latents. What was applied is subtracted; the rest, over l_k, is added to the output of step k.

The output of a PARTIAL step is off by what its stale context costs; the calibration knows how much, and such a point
gets less weight. Active and inactive tokens were computed in other steps, and have weights of their own.

All of it is made with the plan, as `[S, 2, order + 2]` numbers. The forms take a step's `[2, order + 2]` as data
(`passes/blend.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .calibration import Array, Calibration
from .partition import TokenKind
from .passes.blend import ACTIVE, INACTIVE
from .schedule import StepKind

RIDGE = 1e-6
"""Of the regression, against the mean energy of an output: a calibration has few clips, and the points are nearly
collinear."""

STEADY = 1e-3
"""How far the steps of one solver may be from one number, against the longest: rounding of float32."""


class Outputs:
    """What a calibration knows of the outputs of one kind of token, over the steps of an edit.

    Args:
        gram: `[S, S]`, inner products of the outputs of two steps.
        lengths: `[S]`, how far a step moves the latents for an output of 1, in any unit.
    """

    def __init__(self, gram: Array, lengths: Array) -> None:
        self.gram, self.lengths = gram, lengths
        self.ridge = RIDGE * float(np.trace(gram)) / max(1, len(lengths))
        with_moves = np.cumsum(gram * lengths, axis=1)
        self._products = np.concatenate([np.zeros((len(lengths), 1)), with_moves], axis=1)
        squares = np.cumsum(np.cumsum(gram * np.outer(lengths, lengths), axis=0), axis=1)
        self._squares = np.pad(squares, ((1, 0), (1, 0)))

    def predict(self, points: Sequence[int], noise: Sequence[float] | Array, steps: Sequence[int]) -> Array:
        """Weights `[B, P]` of the outputs of the steps `points` that predict the outputs of B steps.

        Args:
            points: the latest first: towards its repetition the regression is drawn.
            noise: `[P]`, expected squared errors of their outputs.
            steps: those to predict.
        """
        index, noises = (np.tile(np.asarray(row), (len(steps), 1)) for row in (points, noise))
        return self._fit(index, noises, self.gram[np.asarray(steps)[:, None], index], np.ones(len(steps)))

    def fit_moves(self, start: int, stops: Sequence[int], points: NDArray[np.int64], noise: Array) -> Array:
        """Weights `[B, P]` of outputs that come nearest to the moves of the steps from `start` up to each stop.

        Args:
            start: the first step of all moves.
            stops: B steps, not included.
            points: int64 `[B, P]`.
            noise: `[B, P]`.
        """
        totals = np.array([self.lengths[start:stop].sum() for stop in stops])
        return self._fit(points, noise, self._products_with(start, stops, points), totals)

    def squared_errors(
        self, start: int, stops: Sequence[int], points: NDArray[np.int64], noise: Array, weights: Array
    ) -> Array:
        """`[B]`: expected squared errors of the latents where weighted points stand for the moves of `fit_moves`."""
        stop = np.asarray(stops)
        s = self._squares
        energy = s[stop, stop] - s[start, stop] - s[stop, start] + s[start, start]
        crossed = (weights * self._products_with(start, stops, points)).sum(axis=1)
        own = np.einsum("bp,bpq,bq->b", weights, self._known(points), weights) + (weights**2 * noise).sum(axis=1)
        return np.asarray(np.maximum(0.0, energy - 2 * crossed + own))

    def _fit(self, points: NDArray[np.int64], noise: Array, products: Array, totals: Array) -> Array:
        start = np.zeros(points.shape)
        start[:, 0] = totals
        diagonal = np.eye(points.shape[1])
        matrix = self._known(points) + noise[:, :, None] * diagonal
        missing = products - np.einsum("bpq,bq->bp", matrix, start)
        return np.asarray(start + np.linalg.solve(matrix + self.ridge * diagonal, missing[..., None])[..., 0])

    def _known(self, points: NDArray[np.int64]) -> Array:
        return np.asarray(self.gram[points[:, :, None], points[:, None, :]])

    def _products_with(self, start: int, stops: Sequence[int], points: NDArray[np.int64]) -> Array:
        """`[B, P]`: inner products of outputs with moves."""
        return np.asarray(self._products[points, np.asarray(stops)[:, None]] - self._products[points, start])


@dataclass(frozen=True)
class Method:
    """How outputs are predicted and corrected.

    Attributes:
        order: one less than how many computed outputs are kept.
        fitted: whether weights come from a calibration; else they are Lagrange's, over the timesteps.
        corrects: whether a step that computes corrects predictions before it.
    """

    order: int = 0
    fitted: bool = False
    corrects: bool = False


def lagrange(times: Array, points: Sequence[int], step: int) -> Array:
    """Weights `[P]` of the polynomial through the outputs of some steps."""
    known = times[list(points)]
    return np.array([np.prod([(times[step] - o) / (here - o) for o in known if o != here]) for here in known])


def moved(
    outputs: Outputs, points: Sequence[int], noise: Sequence[float] | Array, last: int, times: Array | None = None
) -> Array:
    """What steps move the latents by, where those after the latest point are predicted, as weights of the points.

    Args:
        outputs: of one kind of token.
        points: steps, the latest first.
        noise: `[P]`, see `Outputs.predict`.
        last: the last step, not included.
        times: `[S]`, for Lagrange's weights in place of fitted ones.

    Returns:
        `[B, P]`: up to each step from the one after the latest point to `last`.
    """
    latest = points[0]
    weights = np.eye(len(points))[:1]
    if steps := range(latest + 1, last):
        if times is None:
            predicted = outputs.predict(points, noise, steps)
        else:
            predicted = np.array([lagrange(times, points, step) for step in steps])
        weights = np.concatenate([weights, predicted])
    return np.asarray(np.cumsum(weights * outputs.lengths[latest:last, None], axis=0))


def step_weights(
    calibration: Calibration, steps: Sequence[StepKind], timesteps: Array, lengths: Array, method: Method
) -> NDArray[np.float32]:
    """The weights of every step, `[S, 2, order + 2]`: by kind of token, of the fresh output and of the points.

    Args:
        calibration: of the model.
        steps: the schedule.
        timesteps: `[S]` of the edit.
        lengths: `[S]`, see `step_lengths`.
        method: what the forms can do.
    """
    result = np.zeros((len(steps), 2, method.order + 2), dtype=np.float32)
    for tokens, kind in ((ACTIVE, active_kind(calibration)), (INACTIVE, inactive_kind(calibration))):
        outputs = Outputs(calibration.gram_at(timesteps)[kind], lengths)
        noise = partial_noise(calibration, steps, timesteps, kind)
        computed = {StepKind.FULL} | ({StepKind.PARTIAL} if tokens == ACTIVE else set())
        points: list[int] = []
        for step, what in enumerate(steps):
            fresh = what in computed
            of_points = noise[points].tolist()
            row = result[step, tokens]
            if fresh:
                row[0] = 1
            elif points:
                row[1 : 1 + len(points)] = outputs.predict(points, of_points, [step])[0]
            # Behind an exact output there is nothing to correct, and the regression's ridge would put something there.
            wrong = points and (points[0] < step - 1 or noise[points[0]] > 0)
            if fresh and wrong and method.corrects:
                correction = _correction(outputs, step, points, float(noise[step]), of_points)
                row[: 1 + len(points)] += correction
            if fresh:
                points = [step, *points][: method.order + 1]
    return result


def _correction(outputs: Outputs, step: int, points: list[int], own_noise: float, noise: list[float]) -> Array:
    """What is added to the weights of the fresh output and of the points, `[1 + P]`."""
    start = points[0]
    before = moved(outputs, points, noise, step)[-1]
    every, noises = np.array([[*points, step]]), np.array([[*noise, own_noise]])
    after = outputs.fit_moves(start, [step], every, noises)[0]
    return np.asarray(np.array([after[-1], *(after[:-1] - before)]) / outputs.lengths[step])


def partial_noise(
    calibration: Calibration, steps: Sequence[StepKind], timesteps: Array, kind: TokenKind
) -> NDArray[np.float64]:
    """`[S]`: expected squared error of the output of each PARTIAL step; 0 for others."""
    squared = partial_errors_squared(calibration, timesteps, kind)
    noise, full = np.zeros(len(steps)), 0
    for step, what in enumerate(steps):
        if what is StepKind.FULL:
            full = step
        elif what is StepKind.PARTIAL:
            noise[step] = squared[full, step]
    return noise


def partial_errors_squared(calibration: Calibration, timesteps: Array, kind: TokenKind) -> Array:
    """`[S, S]` by source and target, at most what an output of 0 would be off by."""
    energy = np.diagonal(calibration.gram_at(timesteps)[kind])
    relative = calibration.partial_errors(timesteps)[kind]
    return np.asarray(np.where(np.isfinite(relative), np.minimum(relative, 1) ** 2, 1) * energy)


def active_kind(calibration: Calibration) -> TokenKind:
    """The kind that stands for active tokens: the first that some clip has."""
    return next(kind for kind in TokenKind if calibration.counts[kind])


def inactive_kind(calibration: Calibration) -> TokenKind:
    """The kind that stands for inactive tokens."""
    return next(kind for kind in reversed(TokenKind) if calibration.counts[kind])


@torch.no_grad()
def step_lengths(scheduler: Any, num_steps: int) -> Array | None:
    """How far each step of a solver moves the latents for an output of 1, `[S]`.

    Found by trying: a solver is asked for all its steps, twice, with numbers drawn at random.

    Returns:
        None where that is no number: a solver that looks at earlier outputs, or adds noise, cannot be corrected.
    """
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        """Nothing near 0, which could not be divided by."""
        return torch.rand(1, 4, 1, 2, 2, generator=generator) + 0.5

    both = []
    for _ in range(2):
        trial, sample = copy.deepcopy(scheduler), draw()
        trial.set_timesteps(num_steps)
        for timestep in trial.timesteps:
            output = draw()
            try:
                if hasattr(trial, "scale_model_input"):
                    trial.scale_model_input(sample, timestep)
                after = trial.step(output, timestep, sample, return_dict=False)[0]
            except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
                return None  # it wants other arguments than a sampler of velocities gives
            both.append(((after - sample).double() / output.double()).flatten().numpy())
            sample = after.to(output.dtype)
    moves = np.concatenate(np.split(np.array(both), 2), axis=1)
    lengths = np.median(moves, axis=1)
    steady = (np.abs(moves - lengths[:, None]) <= STEADY * np.abs(lengths).max()).all() and (lengths != 0).all()
    return np.abs(lengths) if steady else None
