"""Outputs of steps that compute little, from those that computed: a linear multistep method fitted to the model.

A solver integrates the model's output over the noise levels. Where a step computes nothing its output is predicted, and
where one computes again it can say what the predictions before it should have been. Both are linear combinations of a
few computed outputs, as in the predictors and correctors of Adams' methods (and UniPC, arXiv 2302.04867). Adams'
weights suit polynomials. Outputs of a diffusion model are no polynomials (they turn sharply at the end), but how they
vary together over the steps is nearly the same for every edit, and a calibration knows it: the inner products of the
outputs of all steps (`Record.gram`). So the weights here are those of least expected squared error:

* predicted: `E |v_j - sum_i w_i v_(s_i)|^2` is least, over the last computed steps s_i;
* corrected: the step k that computes again also knows its own output. `E |sum_j l_j v_j - sum_i w_i v_(s_i)|^2` is
  least over k and the steps s_i, where j runs over the steps since the last computed one and l_j is how far each moves
  the latents. What was applied is subtracted; the rest, over l_k, is added to the output of step k. That output was
  computed where the predictions led, and is off for it, by as much as the calibration's `sensitivity` says. In few
  steps this can be most of what a prediction costs.

The output of a PARTIAL step is off by what its stale context costs. The calibration knows how much, and how alike these
errors are from one PARTIAL step to the next, and such a point gets less weight. Active and inactive tokens were
computed in other steps, and have weights of their own.

All of it is made with the plan, as `[S, 2, order + 2]` numbers. The forms take a step's `[2, order + 2]` as data
(`passes/blend.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..passes.ir.contract import ACTIVE, INACTIVE
from ..plan.partition import TokenKind
from ..plan.prediction import Prediction
from ..plan.schedule import StepKind
from .record import Array, Record

Index = NDArray[np.int64]
"""Steps."""

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
        sways: `[S]`, how much of an error of the latents before a step its output adds to it.
        correlation: of the errors of the outputs of different PARTIAL steps, 0 to 1.
    """

    def __init__(self, gram: Array, lengths: Array, sways: Array, correlation: float = 0.0) -> None:
        self.gram, self.lengths, self.sways, self.correlation = gram, lengths, sways, correlation
        self.ridge = RIDGE * float(np.trace(gram)) / max(1, len(lengths))
        self._moved = np.cumsum([0.0, *lengths])
        with_moves = np.cumsum(gram * lengths, axis=1)
        self._products = np.concatenate([np.zeros((len(lengths), 1)), with_moves], axis=1)
        squares = np.cumsum(np.cumsum(gram * np.outer(lengths, lengths), axis=0), axis=1)
        self._squares = np.pad(squares, ((1, 0), (1, 0)))

    def predict(self, points: Index, noise: Array, steps: Index) -> Array:
        """Weights `[B, P]` of the outputs of the steps `points` that predict the outputs of B steps.

        Args:
            points: `[B, P]`, the latest first: towards its repetition the regression is drawn.
            noise: `[B, P]`, expected squared errors of their outputs.
            steps: `[B]`, those to predict.
        """
        return self._fit(points, noise, self.gram[steps[:, None], points], np.ones(len(steps)))

    def fit_moves(self, starts: Index, stops: Index, points: Index, noise: Array) -> Array:
        """Weights `[B, P]` of outputs that come nearest to the moves of the steps from each start up to its stop.

        Args:
            starts: `[B]`, first steps.
            stops: `[B]`, not included.
            points: `[B, P]`, see `predict`.
            noise: `[B, P]`.
        """
        return self._fit(
            points, noise, self._products_with(starts, stops, points), self._moved[stops] - self._moved[starts]
        )

    def correct(self, stops: Index, points: Index, noise: Array, own: Array) -> tuple[Array, Array, Array]:
        """Weights, as of `fit_moves`, for the moves from the latest point up to a stop that computes again.

        Args:
            stops: `[B]`, steps.
            points: `[B, P]`, see `predict`.
            noise: `[B, P]`.
            own: `[B]`, expected squared errors of the outputs of the stops, given the right latents.

        Returns:
            `[B, P + 1]` the weights of the points and the stop; `[B]` what they miss, as `missed`, and with it what the
            stop's output is off by because of where the predictions led; `[B]` what they pass on of the noise.
        """
        starts, predicted = points[:, 0], moved(self, stops, points, noise)
        led_astray = self.missed(starts, stops, points, predicted) + self.passed_on(noise, predicted)
        length = self.lengths[stops]  # 0 where a solver stays at a time
        swayed = np.divide(self.sways[stops], length, out=np.zeros(len(stops)), where=length > 0) ** 2 * led_astray
        points, noise = np.column_stack([points, stops]), np.column_stack([noise, own])
        # The error of the stop's output goes into the latents with its weight here, and with the step's own length.
        products = self._products_with(starts, stops, points)
        products[:, -1] -= length * swayed
        weights = self._fit(points, noise, products, self._moved[stops] - self._moved[starts], swayed)
        missed = self.missed(starts, stops, points, weights) + (weights[:, -1] + length) ** 2 * swayed
        return weights, missed, self.passed_on(noise, weights)

    def missed(self, starts: Index, stops: Index, points: Index, weights: Array) -> Array:
        """`[B]`: expected squared errors of the latents where weighted points stand for the moves of `fit_moves`.

        The points' own errors left aside, see `passed_on`.
        """
        s = self._squares
        energy = s[stops, stops] - s[starts, stops] - s[stops, starts] + s[starts, starts]
        crossed = (weights * self._products_with(starts, stops, points)).sum(axis=1)
        own = np.einsum("bp,bpq,bq->b", weights, self._known(points), weights)
        return np.asarray(np.maximum(0.0, energy - 2 * crossed + own))

    def passed_on(self, noise: Array, weights: Array) -> Array:
        """`[B]`: expected squared errors that the errors `noise` of weighted points leave in the latents."""
        return np.asarray(np.einsum("bp,bpq,bq->b", weights, self._errors(noise), weights))

    def _fit(self, points: Index, noise: Array, products: Array, totals: Array, of_last: Array | None = None) -> Array:
        """The regression. `of_last` is more noise of the last point, which is unlike that of the others."""
        start = np.zeros(points.shape)
        start[:, 0] = totals
        matrix = self._known(points) + self._errors(noise)
        if of_last is not None:
            matrix[:, -1, -1] += of_last
        missing = products - np.einsum("bpq,bq->bp", matrix, start)
        ridge = self.ridge * np.eye(points.shape[1])
        return np.asarray(start + np.linalg.solve(matrix + ridge, missing[..., None])[..., 0])

    def _errors(self, noise: Array) -> Array:
        """`[B, P, P]`: inner products of the errors of points."""
        sizes = np.sqrt(noise)
        alike = self.correlation + (1 - self.correlation) * np.eye(noise.shape[1])
        return np.asarray(alike * sizes[:, :, None] * sizes[:, None, :])

    def _known(self, points: Index) -> Array:
        return np.asarray(self.gram[points[:, :, None], points[:, None, :]])

    def _products_with(self, starts: Index, stops: Index, points: Index) -> Array:
        """`[B, P]`: inner products of outputs with moves."""
        return np.asarray(self._products[points, stops[:, None]] - self._products[points, starts[:, None]])


def lagrange(times: Array, points: Index, steps: Index) -> Array:
    """Weights `[B, T, P]` of the polynomials through the outputs of `points` `[B, P]`, at `steps` `[B, T]`."""
    known, others = times[points], ~np.eye(points.shape[1], dtype=bool)
    from_others = times[steps][:, :, None, None] - known[:, None, None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        factors = from_others / (known[:, :, None] - known[:, None, :])[:, None]
    return np.asarray(np.where(others, factors, 1.0).prod(axis=-1))


def moved(outputs: Outputs, stops: Index, points: Index, noise: Array, times: Array | None = None) -> Array:
    """Weights `[B, P]` of points for what the steps from the latest point up to each stop move the latents by.

    The latest point is the first of these steps, the others are predicted.

    Args:
        outputs: of one kind of token.
        stops: `[B]`, steps, not included.
        points: `[B, P]`, steps, the latest first.
        noise: `[B, P]`, see `Outputs.predict`.
        times: `[S]`, for Lagrange's weights in place of fitted ones.
    """
    latest = points[:, 0]
    own = outputs.lengths[latest][:, None] * np.eye(points.shape[1])[0]
    if times is None:
        # A regression is linear in what it predicts: the weights of a sum are the sum of the weights.
        return np.asarray(own + outputs.fit_moves(latest + 1, stops, points, noise))
    steps = latest[:, None] + 1 + np.arange(int((stops - latest).max()) - 1)
    inside = steps < stops[:, None]
    steps = np.minimum(steps, len(outputs.lengths) - 1)
    predicted = lagrange(times, points, steps) * np.where(inside, outputs.lengths[steps], 0.0)[..., None]
    return np.asarray(own + predicted.sum(axis=1))


def step_weights(
    calibration: Record, steps: Sequence[StepKind], timesteps: Array, lengths: Array, method: Prediction
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
        outputs = outputs_of(calibration, timesteps, lengths, kind)
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
                row[1 : 1 + len(points)] = outputs.predict(*_one(points, of_points), np.array([step]))[0]
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
    stops = np.array([step])
    before = moved(outputs, stops, *_one(points, noise))[0]
    after = outputs.correct(stops, *_one(points, noise), np.array([own_noise]))[0][0]
    return np.asarray(np.array([after[-1], *(after[:-1] - before)]) / outputs.lengths[step])


def _one(points: list[int], noise: list[float]) -> tuple[Index, Array]:
    """A batch of one."""
    return np.array([points]), np.array([noise])


def outputs_of(calibration: Record, timesteps: Array, lengths: Array, kind: TokenKind) -> Outputs:
    """What a calibration knows of the outputs of one kind of token, at the times of an edit."""
    gram, sways = calibration.gram_at(timesteps)[kind], calibration.sways_at(timesteps)[kind]
    return Outputs(gram, lengths, sways, calibration.correlation_of(kind))


def partial_noise(
    calibration: Record, steps: Sequence[StepKind], timesteps: Array, kind: TokenKind
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


def partial_errors_squared(calibration: Record, timesteps: Array, kind: TokenKind) -> Array:
    """`[S, S]` by source and target, at most what an output of 0 would be off by."""
    energy = np.diagonal(calibration.gram_at(timesteps)[kind])
    relative = calibration.partial_errors(timesteps)[kind]
    return np.asarray(np.where(np.isfinite(relative), np.minimum(relative, 1) ** 2, 1) * energy)


def active_kind(calibration: Record) -> TokenKind:
    """The kind that stands for active tokens: the first that some clip has."""
    return next(kind for kind in TokenKind if calibration.counts[kind])


def inactive_kind(calibration: Record) -> TokenKind:
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
        return torch.rand(1, 4, 1, 2, 2, generator=generator, device="cpu") + 0.5

    both = []
    for _ in range(2):
        trial, sample = copy.deepcopy(scheduler), draw()
        try:
            trial.set_timesteps(num_steps)
        except ValueError:
            return None  # its times depend on the size of the pictures
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
