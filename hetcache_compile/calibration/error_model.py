"""What a schedule is expected to leave wrong in the latents: a calibration's additive model, run by run.

A *run* is a computed step and the steps after it that predict, up to the next computed one, which may correct them (see
`output_weights`). What a run leaves wrong has an expected squared error, known from the calibration. Later steps make
more or less of it, by the calibration's `amplification`. The unit is the mean square of an output times that of the
whole path, so that the root of a schedule's error is a share of what the path moves. Active and inactive tokens count
alike, whatever their area. What a run adds:

* Active tokens (as generative ones, see `output_weights.active_kind`): a run goes from one computed step, FULL or
  PARTIAL, to the next. The output of a PARTIAL step is off by what was recorded for the last FULL step as its source.
* Inactive tokens (as context, also where a plan's margin is narrower than the calibration's): from one FULL step to the
  next. The FULL step before is taken to be as far back again.

What predictions miss differs from run to run, so these errors are taken for independent and their squares add up. What
PARTIAL steps are off by does not: they all read stale context. Where two of these errors have correlation r, the
squares of n of them count 1 + r (n - 1) times.
"""

from __future__ import annotations

from itertools import product

import numpy as np

from ..errors import CalibrationError
from ..plan.prediction import Prediction
from .output_weights import Index, Outputs, active_kind, inactive_kind, moved, outputs_of, partial_errors_squared
from .record import Array, Record


class RecordedErrors:
    """The additive model of a calibration, for one edit.

    Args:
        calibration: what was measured.
        timesteps: `[S]`, those of the edit; any number of them.
        method: how outputs are predicted and corrected.
        lengths: `[S]` of `output_weights.step_lengths`; by default those of Euler's method in flow matching.
    """

    def __init__(
        self, calibration: Record, timesteps: Array, method: Prediction | None = None, lengths: Array | None = None
    ) -> None:
        if not calibration.counts.any():
            raise CalibrationError("the calibration holds no clip yet: run hetcache calibrate again")
        self.method = method or Prediction()
        self.timesteps, lengths = timesteps, flow_lengths(timesteps) if lengths is None else lengths
        self.lengths = lengths / lengths.sum()
        amplification = calibration.amplification_at(timesteps)
        active, inactive = active_kind(calibration), inactive_kind(calibration)
        self.correlation = calibration.correlation_of(active)
        self.active, self.inactive = (
            outputs_of(calibration, timesteps, self.lengths, kind) for kind in (active, inactive)
        )
        last = amplification[:, -1:]
        self.amplified = {
            outputs: np.concatenate([amplification, last], axis=1)[kind] ** 2
            for outputs, kind in ((self.active, active), (self.inactive, inactive))
        }
        self.allowed = np.isfinite(calibration.partial_errors(timesteps)[active])
        self.noise = partial_errors_squared(calibration, timesteps, active)
        self.inactive_runs = self._inactive_runs()

    def runs(self, full: Index, computed: Index, stops: Index) -> tuple[Array, Array]:
        """See `schedule_search.ErrorModel`."""
        points = computed[:, ::-1]
        noise = self._noise_of(full, points)
        to_full = self._left(self.active, points, noise, stops, np.zeros(len(stops)))
        to_full[:, 0] += self.inactive_runs[full, stops]
        to_partial = self._left(self.active, points, noise, stops, self.noise[full, stops])
        return to_full / 2, np.where(self.allowed[full, stops][:, None], to_partial / 2, np.inf)

    def last_runs(self, full: Index, computed: Index) -> Array:
        """See `schedule_search.ErrorModel`."""
        points = computed[:, ::-1]
        stops = np.full(len(full), len(self.lengths))
        left = self._left(self.active, points, self._noise_of(full, points), stops, None)
        left[:, 0] += self.inactive_runs[full, -1]
        return left / 2

    def _inactive_runs(self) -> Array:
        """`[S, S + 1]`: errors of inactive tokens from one FULL step to the next, or to the end."""
        num_steps = len(self.lengths)
        result = np.zeros((num_steps, num_steps + 1))
        full, stops = np.triu_indices(num_steps, 1, num_steps + 1)
        points = np.stack([full, np.maximum(0, 2 * full - stops)], axis=1)
        for is_first, is_last in product((True, False), repeat=2):
            (these,) = np.nonzero(((full == 0) == is_first) & ((stops == num_steps) == is_last))
            if these.size:
                known = points[these, : 1 if is_first or not self.method.order else 2]
                own = None if is_last else np.zeros(len(these))
                left = self._left(self.inactive, known, np.zeros(known.shape), stops[these], own)
                result[full[these], stops[these]] = left[:, 0]
        return result

    def _noise_of(self, full: Index, points: Index) -> Array:
        return np.asarray(np.where(points > full[:, None], self.noise[full[:, None], points], 0.0))

    def _left(self, outputs: Outputs, points: Index, noise: Array, stops: Index, own: Array | None) -> Array:
        """`[B, 2]`: squared error in the end of the steps from the latest point up to each stop.

        `own` is the noise of the outputs of the stops, or None where they have none.
        """
        if own is not None and self.method.corrects:
            _, missed, passed_on = outputs.correct(stops, points, noise, own)
        else:
            weights = moved(outputs, stops, points, noise, None if self.method.fitted else self.timesteps)
            missed = outputs.missed(points[:, 0], stops, points, weights)
            passed_on = outputs.passed_on(noise, weights)
        return np.asarray(np.stack([missed, passed_on], axis=1) * self.amplified[outputs][stops][:, None])


def flow_lengths(timesteps: Array) -> Array:
    """`[S]`: how far Euler's method moves the latents in flow matching, where timesteps are noise levels."""
    return np.asarray(-np.diff([*timesteps, 0.0]))
